"""What a run needs, found out before it starts: compilation for GPUs that are not there."""
