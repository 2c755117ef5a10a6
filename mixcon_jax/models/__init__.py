"""Models: a decoder of stacked pattern blocks, whose layers are mixers and FFNs."""
