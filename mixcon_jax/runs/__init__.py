"""A run's directory: what is in it, who may use it, how it is written so that it survives, and how it is read."""
