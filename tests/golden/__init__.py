"""A committed loss curve that guards the whole training path, from text to losses."""
