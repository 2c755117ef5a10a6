"""`mixcon plan`: compiles the true step for GPUs that are not there, and says what it needs."""
