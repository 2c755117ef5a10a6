"""The device a kernel is being traced for: one that is here, or one that is compiled for while absent.

`jax.default_backend()` tells only of devices that are here. A compile for an absent GPU names its device as JAX's
default device, `with jax.default_device(device)`.
"""

import jax


def device() -> jax.Device:
    """JAX's default device if one is set, by itself or by its platform's name, else the first device."""
    found = jax.config.jax_default_device
    return jax.devices(found)[0] if found is None or isinstance(found, str) else found


def platform() -> str:
    """Returns 'cpu', 'gpu' (NVIDIA) or whatever JAX calls another platform."""
    name = device().platform
    return 'gpu' if name == 'cuda' else name


def compute_capability() -> tuple[int, int] | None:
    """Returns the CUDA compute capability, such as (9, 0), or None where there is none."""
    if platform() != 'gpu':
        return None
    major, _, minor = device().compute_capability.partition('.')
    return int(major), int(minor or 0)
