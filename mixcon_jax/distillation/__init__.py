"""Other forms of trained models, as runs of their own."""
