"""Mosaic GPU's interpreter, whose import path is private: kernels for GPUs run on the CPU, step by step."""

from typing import Any

from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams


def parameters(**options: Any) -> InterpretGPUParams:
    """Race detection on: it raises where memory is read before the copy engine's barrier was waited for."""
    return InterpretGPUParams(**{'detect_races': True} | options)


def reset() -> None:
    """Needed in a process after a kernel has raised."""
    reset_gpu_interpret_mode_state()
