"""Attention offload: KV caches, and the attention over them, on workers rich in memory; weights stay on model ranks."""
