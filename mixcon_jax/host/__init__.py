"""The machine that the program runs on: paths, locks, terminal, signals, environment, libraries. Loads no JAX."""
