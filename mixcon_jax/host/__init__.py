"""The machine that the program runs on: paths, locks, terminal, signals, environment, libraries, other processes.

Only ``compilation`` and ``processes`` load JAX.
"""
