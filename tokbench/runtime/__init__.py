"""Where it runs: devices and precision, processes, tiles, randomness by image, and what a waiting person sees.

In: names of devices, seeds, counts; out: torch devices, equal noise on every device, one voice on stderr.
"""
