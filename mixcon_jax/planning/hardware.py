"""What devices can do: peaks for MFU, and GPUs as XLA's compiler sees them. Loads no JAX.

The figures are those of the vendors' data sheets and of the CUDA device properties. What can be compiled for stands in
``devices/``, a file each; a test holds `PEAK_FLOPS`, which knows more models, against them.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

# Peak dense bfloat16 (on V100: float16) FLOP/s of one device, from the makers' data sheets, without sparsity. The first
# entry whose words all stand in ``device_kind`` counts, so that 'H100 PCIe' comes before 'H100'.
PEAK_FLOPS = (
    ('GB300', 2500e12),
    ('GB200', 2500e12),
    ('B300', 2250e12),
    ('B200', 2250e12),
    ('B100', 1750e12),
    ('H200 NVL', 835e12),
    ('H200', 989e12),
    ('H100 PCIe', 756e12),
    ('H100 NVL', 835e12),
    ('H100', 989e12),
    ('GH200', 989e12),
    ('H800 PCIe', 756e12),
    ('H800', 989e12),
    ('H20', 148e12),
    ('A100', 312e12),
    ('A800', 312e12),
    ('A30', 165e12),
    ('A40', 149.7e12),
    ('A10G', 70e12),
    ('A10', 125e12),
    ('L40S', 362e12),
    ('L40', 181e12),
    ('L4', 121e12),
    ('A6000', 154.8e12),
    ('4090', 165.2e12),
    ('3090', 71e12),
    ('V100', 125e12),
    ('TPU v6', 918e12),
    ('TPU v5 lite', 197e12),
    ('TPU v5e', 197e12),
    ('TPU v5p', 459e12),
    ('TPU v5', 459e12),  # the same
    ('TPU v4', 275e12),
)


@dataclass(frozen=True)
class Target:
    """One GPU model: as XLA's compiler sees it, and how fast its parts are. From ``devices/<model>.toml``."""

    name: str  # what XLA calls the device
    capability: tuple[int, int]  # CUDA compute capability
    cores: int  # streaming multiprocessors
    fpus: int  # float32 units of a multiprocessor
    shared_bytes: int  # shared memory of a multiprocessor
    shared_bytes_block: int  # the most that one block may take
    l2_bytes: int
    memory_bytes: int
    clock_ghz: float
    flops: float  # dense bfloat16, per second
    bandwidth: float  # of the memory, bytes per second
    nvlink: float  # to the devices of the same host, bytes per second one way
    network: float  # to other hosts, bytes per second one way, of one device
    threads: int = 2048  # that a multiprocessor holds
    aliases: tuple[str, ...] = ()

    @property
    def exponentials(self) -> float:
        """Exponentials per second: 16 special-function units a multiprocessor."""
        return 16 * self.cores * self.clock_ghz * 1e9

    def textproto(self) -> str:
        """XLA's ``GpuTargetConfigProto`` in text form."""
        major, minor = self.capability
        # Instructions of one architecture only: sm_90a, not sm_90.
        feature = ' feature_extension: ACCELERATED_FEATURES' if major >= 9 else ''
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {self.threads}
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


def _read() -> dict[str, Target]:
    found: dict[str, Target] = {}
    for path in sorted((Path(__file__).parent / 'devices').glob('*.toml')):
        values = tomllib.loads(path.read_text(encoding='utf-8'))
        values |= {key: tuple(values[key]) for key in ('capability', 'aliases') if key in values}
        target = Target(**values)
        found |= dict.fromkeys((path.stem, *target.aliases), target)
    return found


TARGETS = _read()


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a device by its ``jax.Device.device_kind``; None when it is not in the table, as no CPU is."""
    words = device_kind.replace('-', ' ').lower().split()
    for name, flops in PEAK_FLOPS:
        if all(word in words for word in name.lower().split()):
            return flops
    return None
