"""`python -m tokbench`, which is what torchrun starts."""

from tokbench.cli import main

main()
