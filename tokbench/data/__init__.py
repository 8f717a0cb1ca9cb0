"""Images in: from files, archives, lists and data sets to the uint8 crops that a protocol prescribes.

In: what `--data` says; out: a `Source` of images with ids, and batches of crops decoded ahead of their use.
"""
