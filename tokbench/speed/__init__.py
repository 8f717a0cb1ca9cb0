"""How fast tokenizers are, side by side: throughput, latency, memory and cost.

In: specs of tokenizers and a device; out: a `SpeedResult` for each at each resolution.
"""
