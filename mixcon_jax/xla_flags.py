"""What XLA is told when it compiles a train step: the flags worth knowing, each with what it is for, in one place.

`train.deterministic` sets one of them; `train.xla_flags` sets any, for the train step alone, where XLA_FLAGS in the
environment would reach every program. None but the first is set by default: what they bring hangs on model, mesh and
network, and no GPU of ours has measured them. Their names and values are held against the pinned XLA by a test that
compiles a step for eight absent H100s with each.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from mixcon_jax.errors import ConfigError, first_line

DETERMINISTIC = 'xla_gpu_exclude_nondeterministic_ops'
Value = bool | int | float | str


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of XLA's that training may want.

    Attributes:
      value: to try, in place of XLA's own.
      on: 'one GPU', 'one host' of several GPUs, or 'several hosts'; what is for one is for more as well.
      meaning: what it does and when to try it.
    """

    value: Value
    on: str
    meaning: str


FLAGS: dict[str, Flag] = {
    DETERMINISTIC: Flag(
        True, 'one GPU',
        'Only operations that add up in one order; `train.deterministic` sets it. Needs the GPU itself to compile.',
    ),
    'xla_gpu_autotune_level': Flag(
        0, 'one GPU', 'How hard XLA tries out matrix products by timing them; 0 starts faster and runs slower.'
    ),
    'xla_gpu_enable_triton_gemm': Flag(
        False, 'one GPU',
        'Matrix products by cuBLAS alone: another choice of temporaries, where memory is just too small.',
    ),
    'xla_gpu_enable_command_buffer': Flag(
        'FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL', 'one GPU',
        'What is recorded and replayed as one launch, as a CUDA graph; an empty value turns it off. For small models,'
        ' whose launches cost more than their kernels.',
    ),
    'xla_gpu_graph_min_graph_size': Flag(
        1, 'one GPU', 'Fewest operations that are recorded together; goes with the flag above.'
    ),
    'xla_gpu_memory_limit_slop_factor': Flag(
        95, 'one GPU', 'Percent of the memory that XLA plans with before it computes arrays again to save some.'
    ),
    'xla_gpu_enable_latency_hiding_scheduler': Flag(
        True, 'one host', 'Orders exchanges between GPUs so that products run meanwhile; takes memory.'
    ),
    'xla_gpu_all_gather_combine_threshold_bytes': Flag(
        256 * 2**20, 'one host',
        'Joins gathers of parameters (fsdp) until they are as large: fewer and larger, later and with more memory.',
    ),
    'xla_gpu_reduce_scatter_combine_threshold_bytes': Flag(
        256 * 2**20, 'one host', 'The same of gradients under fsdp.'
    ),
    'xla_gpu_all_reduce_combine_threshold_bytes': Flag(
        256 * 2**20, 'one host', 'The same of gradients under data parallelism.'
    ),
    'xla_gpu_enable_while_loop_double_buffering': Flag(
        True, 'one host',
        'Writes two rounds of the loop over blocks out, so that what one exchanges needs no copy in the next.',
    ),
    'xla_gpu_enable_highest_priority_async_stream': Flag(
        True, 'one host', 'Exchanges go before products where both want the GPU.'
    ),
    'xla_gpu_enable_nccl_user_buffers': Flag(
        True, 'one host',
        "NCCL reads and writes arrays in place: fewer of the GPU's cores and less memory traffic an exchange.",
    ),
    'xla_gpu_experimental_parallel_collective_overlap_limit': Flag(
        2, 'several hosts', 'Exchanges on their way at once, where axes go over different networks.'
    ),
    'xla_gpu_all_reduce_blueconnect_num_devices_per_host': Flag(
        8, 'several hosts', "Sums within hosts first, then across: the slow network carries an eighth."
    ),
}  # fmt: skip


def parse(texts: Sequence[str]) -> dict[str, Value]:
    """The flags that ``NAME=VALUE`` say, values as XLA wants them.

    Raises:
      ConfigError: one says what an option is for, or a name comes twice.
    """
    flags: dict[str, Value] = {}
    for text in texts:
        name, _, value = text.partition('=')
        if name == DETERMINISTIC:
            raise ConfigError(f'train.xla_flags sets {name}; that is what train.deterministic is for')
        if name in flags:
            raise ConfigError(f'train.xla_flags sets {name} twice')
        flags[name] = _typed(value)
    return flags


def _typed(text: str) -> Value:
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def compiler_options(deterministic: bool, texts: Sequence[str], device: Any) -> dict[str, Value] | None:
    """JAX's ``compiler_options`` of a train step; None where there are none.

    Args:
      deterministic: ``config.train.deterministic``.
      texts: ``config.train.xla_flags``.
      device: one of the mesh's.

    Raises:
      ConfigError: a flag that this XLA does not have, or a value that it does not take.
    """
    flags = parse(texts)
    if flags:
        try:
            jax.jit(lambda: 0, compiler_options=flags).lower().compile()
        except jax.errors.JaxRuntimeError as error:
            reason = first_line(error)
            raise ConfigError(f'train.xla_flags: {reason}; mixcon_jax/xla_flags.py lists some') from error
    if deterministic and _ordered(device):
        flags[DETERMINISTIC] = True
    return flags or None


def _ordered(device: Any) -> bool:
    """Whether a device needs to be told to add up in one order.

    A CPU does so anyway; a GPU that is compiled for while absent cannot, since the option wants to ask the device about
    its products.
    """
    return device.platform == 'gpu' and device in jax.devices()
