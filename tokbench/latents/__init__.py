"""The card of a latent space: what latents, and images decoded between them, say without a generator.

In: tokenizers and images; out: records like those of `run`, in a folder of their own, and the table of the card.
"""
