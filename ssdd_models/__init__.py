"""SSDD, the single-step diffusion decoder (arXiv 2510.04961): model, losses, training."""
