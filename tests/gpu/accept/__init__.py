"""Everything worth knowing from one GPU in one command: `python -m tests.gpu.accept --help`."""
