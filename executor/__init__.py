"""Meshwright's executor: runs a plan on real torch.distributed process groups, and measures it."""
