"""Meshwright's planner: chooses how to split the training of a model over GPUs, and predicts what that will cost."""

__version__ = "0.1.0"
