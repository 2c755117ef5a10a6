"""Trained models at work: put together from a run directory, and sampled from."""
