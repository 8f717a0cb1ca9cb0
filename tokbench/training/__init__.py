"""What all training loops here share; the losses of a step are with the models.

In: a configuration and images; out: steps to take, and a folder with log, checkpoints, scores and pictures.
"""
