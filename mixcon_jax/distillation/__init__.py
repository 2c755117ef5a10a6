"""Other forms of trained models."""
