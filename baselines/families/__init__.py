"""Published tokenizers that diffusers does not read: one module a family, with the table of its configurations.

Each has `published(name, file, random_weights, ...)`; `quantisers` and `transformers` hold what several of them share.
"""
