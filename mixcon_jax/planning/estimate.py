"""An estimate of a step's time from what a compiled module moves and computes: a floor and no measurement."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mixcon_jax.planning.collectives import COLLECTIVES, Exchange
from mixcon_jax.planning.hardware import Target
from mixcon_jax.planning.hlo import Kernel


def estimate(
    found: Sequence[Kernel],
    exchanged: Sequence[Exchange],
    target: Target,
    *,
    flops: float,
    exponentials: float,
    measured: Mapping[str, float],
) -> dict[str, Any]:
    """Seconds of a step on one device, every part at the device's peak but for kernels that cards have timed.

    Args:
      found: kernels of the module, from `hlo.kernels`.
      exchanged: from `collectives.exchanges`.
      target: the device.
      flops: operations of the model's own products on one device; counts where more than the products found, since
        kernels that are called say nothing of theirs.
      exponentials: on one device.
      measured: bytes a second of kernels, by the start of their names, as GPUs have been seen to move them.

    Returns:
      ``compute``, ``memory``, ``exponentials``, ``nvlink`` and ``network``, each alone; ``bound``, the largest of them;
      ``hidden``: kernels one after the other, exchanges behind them; ``exposed``: exchanges after them; ``measured``:
      what of the argument has counted.
    """
    local = [kernel for kernel in found if kernel.kind.removesuffix('-start') not in COLLECTIVES]
    products = max(flops, sum(kernel.flops * kernel.count for kernel in local))
    serial, counted = 0.0, 0
    timed: dict[str, float] = {}
    for kernel in local:
        rate = {name: measured[name] for name in measured if gpu_kernel(kernel).startswith(name)}
        timed |= rate
        seconds = max(kernel.flops / target.flops, kernel.bytes / min(target.bandwidth, *rate.values(), math.inf))
        serial += seconds * kernel.count
        counted += kernel.flops * kernel.count
    serial += max(0.0, products - counted) / target.flops
    nvlink = sum(exchange.sent for exchange in exchanged) / target.nvlink
    network = sum(exchange.across for exchange in exchanged) / target.network
    parts = {
        'compute': products / target.flops,
        'memory': sum(kernel.total for kernel in local) / target.bandwidth,
        'exponentials': exponentials / target.exponentials,
        'nvlink': nvlink,
        'network': network,
    }
    serial = max(serial, parts['exponentials'])
    travel = max(nvlink, network)
    bound = max(parts, key=parts.__getitem__)
    return {**parts, 'bound': bound, 'hidden': max(serial, travel), 'exposed': serial + travel, 'measured': timed}


def gpu_kernel(kernel: Kernel) -> str:
    """The name that its source gives a kernel of Mosaic's; '' of any other."""
    found = re.search(r'/(\w+)/mpmd', kernel.operation) if kernel.kind.startswith('mosaic_gpu') else None
    return found[1] if found else ''
