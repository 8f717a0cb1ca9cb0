"""Baselines: classical codecs and linear floors, a KL-VAE, and published tokenizers."""
