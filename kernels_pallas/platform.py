"""The device a kernel is being traced for: one that is here, or one that is compiled for while absent.

`jax.default_backend()` tells only of devices that are here. A compile for an absent GPU names its device as JAX's
default device, `with jax.default_device(device)`.
"""

import jax


def device() -> jax.Device | str:
    """JAX's default device if one is set (a device, or a platform's name), else the first device."""
    return jax.config.jax_default_device or jax.devices()[0]


def platform() -> str:
    """Returns 'cpu', 'gpu' (NVIDIA) or whatever JAX calls another platform."""
    found = device()
    name = found if isinstance(found, str) else found.platform
    return 'gpu' if name == 'cuda' else name


def compute_capability() -> tuple[int, int] | None:
    """Returns the CUDA compute capability, such as (9, 0), or None where there is none."""
    found = device()
    if platform() != 'gpu':
        return None
    version = (jax.devices(found)[0] if isinstance(found, str) else found).compute_capability
    major, _, minor = version.partition('.')
    return int(major), int(minor or 0)
