"""What is written down: the record of a measurement, per-sample rows and features, files, provenance. No torch.

In: numbers and how they came about; out: files that appear whole or not at all, and the same numbers read back.
"""
