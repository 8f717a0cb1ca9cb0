"""gFID: latents, a diffusion transformer, its training and sampling."""
