"""Masked diffusion over text: `python -m experiments.words {train,generate}`."""
