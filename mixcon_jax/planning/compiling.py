"""Compiling for GPUs that are not there (the extra ``plan``).

XLA takes a description of the device in place of the device. JAX_PLATFORMS must be ``cpu`` before JAX is imported, so
that no GPU is looked for.
"""

from typing import Any

import jax
from jax.experimental import topologies

from mixcon_jax.errors import UserError
from mixcon_jax.planning.hardware import TARGETS


def devices(target: str, hosts: int = 1, devices_per_host: int = 1) -> list[Any]:
    """Returns ``hosts * devices_per_host`` absent devices of a target, to build a mesh from and compile for.

    Raises:
      UserError: an unknown target, or the extra ``plan`` is not installed.
    """
    if target not in TARGETS:
        raise UserError(f'unknown GPU {target!r}; known: {", ".join(TARGETS)}')
    try:
        topology = topologies.get_topology_desc(
            platform='cuda',
            topology=f'1x{hosts}x{devices_per_host}',
            target_config=TARGETS[target].textproto(),
        )
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f'cannot compile for {target}: {error}; is the extra "plan" installed?') from error
    found = list(topology.devices)
    assert len(found) == hosts * devices_per_host
    return found


def lower_for(device: Any, function: Any, *args: Any, **jit_options: Any) -> Any:
    """Lowers a function for an absent device and abstract arguments; returns JAX's ``Lowered``.

    Args:
      device: from `devices`; arguments without a sharding are placed on it.
      function: to be traced.
      args: trees of arrays or ``jax.ShapeDtypeStruct``.
      jit_options: for `jax.jit`.
    """
    placed = jax.sharding.SingleDeviceSharding(device)

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None) or placed)

    args = jax.tree.map(abstract, args)
    # Kernels ask the default device for its architecture.
    with jax.default_device(device):
        return jax.jit(function, **jit_options).trace(*args).lower(lowering_platforms=('cuda',))


def compile_for(device: Any, function: Any, *args: Any, **jit_options: Any) -> Any:
    """Compiles what `lower_for` lowers; returns JAX's ``Compiled``."""
    with jax.default_device(device):
        compiled = lower_for(device, function, *args, **jit_options).compile()
    kind = type(compiled.runtime_executable()).__name__
    assert kind == 'Executable', f'compiled for the CPU instead ({kind}): an argument lacks a sharding'
    return compiled
