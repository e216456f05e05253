"""Adapters that give other libraries' models the attention of seqpar, one module for each library."""
