"""tokbench: one command measures any image tokenizer, under a protocol that is written down."""

__version__ = "0.1.0"
