"""The `seqpar` command: train a language model whose sequence is split over ranks.

`cli` parses and checks; `spawn` starts ranks; `train` is what one rank does. Only the last needs transformers.
"""
