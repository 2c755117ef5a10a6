"""GPUs to compile for on a machine that has none (the extra ``plan``).

XLA takes a description of the device in place of the device; the figures are those of the vendor's data sheets and of
the CUDA device properties. JAX_PLATFORMS must be ``cpu`` before JAX is imported, so that no GPU is looked for.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from mixcon_jax.errors import UserError


@dataclass(frozen=True)
class Target:
    """One GPU model, as XLA's compiler sees it."""

    name: str  # what XLA calls the device
    capability: tuple[int, int]  # CUDA compute capability
    cores: int  # streaming multiprocessors
    fpus: int  # float32 units of a multiprocessor
    shared_bytes: int  # shared memory of a multiprocessor
    shared_bytes_block: int  # the most that one block may take
    l2_bytes: int
    memory_bytes: int
    bandwidth: float  # bytes per second
    clock_ghz: float

    def textproto(self) -> str:
        """XLA's ``GpuTargetConfigProto`` in text form."""
        major, minor = self.capability
        # Instructions of one architecture only: sm_90a, not sm_90.
        feature = ' feature_extension: ACCELERATED_FEATURES' if major >= 9 else ''
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_bytes}
              shared_memory_per_block_optin: {self.shared_bytes_block}
              core_count: {self.cores} fpus_per_core: {self.fpus}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              memory_bandwidth: {self.bandwidth:.0f} l2_cache_size: {self.l2_bytes} clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes} device_address_bits: 64 ecc_enabled: true
              cuda_compute_capability {{ major: {major} minor: {minor}{feature} }}
              device_vendor: "NVIDIA Corporation" name: "{self.name}" pcie_bandwidth: 34359738368
              driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
              dnn_version: "9.10.0"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            runtime_version {{ major: 13 minor: 0 patch: 0 }}
            device_description_str: "{self.name}"
        """


TARGETS = {
    'h100': Target(
        name='NVIDIA H100 80GB HBM3',
        capability=(9, 0),
        cores=132,
        fpus=128,
        shared_bytes=233472,
        shared_bytes_block=232448,
        l2_bytes=52428800,
        memory_bytes=84942979072,
        bandwidth=3.352e12,
        clock_ghz=1.98,
    ),
    'a100': Target(
        name='NVIDIA A100-SXM4-80GB',
        capability=(8, 0),
        cores=108,
        fpus=64,
        shared_bytes=167936,
        shared_bytes_block=166912,
        l2_bytes=41943040,
        memory_bytes=85000000000,
        bandwidth=2.039e12,
        clock_ghz=1.41,
    ),
}


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


def compile_for(device: Any, function: Any, *args: Any, **jit_options: Any) -> Any:
    """Compiles a function for an absent device and abstract arguments; returns JAX's ``Compiled``.

    Args:
      device: from `devices`; arguments without a sharding are placed on it.
      function: to be traced and compiled.
      args: trees of arrays or ``jax.ShapeDtypeStruct``.
      jit_options: for `jax.jit`.
    """
    placed = jax.sharding.SingleDeviceSharding(device)

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None) or placed)

    args = jax.tree.map(abstract, args)
    # Kernels ask the default device for its architecture.
    with jax.default_device(device):
        compiled = jax.jit(function, **jit_options).trace(*args).lower(lowering_platforms=('cuda',)).compile()
    kind = type(compiled.runtime_executable()).__name__
    assert kind == 'Executable', f'compiled for the CPU instead ({kind}): an argument lacks a sharding'
    return compiled
