"""Experiments: one readable script a run. `python -m experiments.mnist --help`."""
