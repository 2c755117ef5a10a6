"""Other programs' models: their names for the parameters that are ours."""
