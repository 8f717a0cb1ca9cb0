"""Two results, one judge: paired differences, and whether quality got worse than a baseline. No torch.

In: records and their per-image tables; out: differences with intervals and verdicts, for people and for CI.
"""
