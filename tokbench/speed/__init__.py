"""How fast tokenizers are, side by side: throughput, latency, memory and cost.

In: specs of tokenizers, resolutions and a device; out: a `SpeedResult` for each at each resolution, and a file of it.
"""
