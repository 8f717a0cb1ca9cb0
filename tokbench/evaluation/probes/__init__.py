"""`tokbench probe`: what one number hides. A probe reconstructs in its own way and gives columns of metrics.

In: a tokenizer, images, names of probes; out: a record of the same store and statistics as `run`'s.
"""

from tokbench.evaluation.probes import boxes, drift, equivariance, legibility, robustness, seeds, spectrum  # noqa: F401
