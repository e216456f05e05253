"""The `seqpar` command: train a language model whose sequence is split over ranks, and generate with one.

`cli` parses and checks; `spawn` starts ranks; `train` and `generate` are what one rank does. Only these need
transformers.
"""
