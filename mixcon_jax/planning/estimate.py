"""An estimate of a step's time from what a compiled module moves and computes: a floor and no measurement."""

from collections.abc import Mapping, Sequence

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
    slower: Mapping[str, float],
) -> dict[str, float | str]:
    """Seconds of a step on one device, every part at the device's peak but for kernels that cards have timed.

    Args:
      found: kernels of the module, from `hlo.kernels`.
      exchanged: from `collectives.exchanges`.
      target: the device.
      flops: operations of the model's own products on one device; counts where more than the products found, since
        kernels that are called say nothing of theirs.
      exponentials: on one device.
      slower: how many times its floor a kernel takes, as cards of verification have measured it, by its name.

    Returns:
      ``compute``, ``memory``, ``exponentials``, ``nvlink`` and ``network``, each alone; ``bound``, the largest of them;
      ``hidden``: kernels one after the other, exchanges behind them; ``exposed``: exchanges after them.
    """
    local = [kernel for kernel in found if kernel.kind.removesuffix('-start') not in COLLECTIVES]
    products = max(flops, sum(kernel.flops * kernel.count for kernel in local))
    serial, counted = 0.0, 0
    for kernel in local:
        seconds = max(kernel.flops / target.flops, kernel.bytes / target.bandwidth * _factor(kernel, slower))
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
    return {**parts, 'bound': bound, 'hidden': max(serial, travel), 'exposed': serial + travel}


def _factor(kernel: Kernel, slower: Mapping[str, float]) -> float:
    """How many times its bytes' time a kernel takes, if a card says so."""
    if not kernel.kind.startswith('mosaic_gpu'):
        return 1.0
    return next((factor for name, factor in slower.items() if f'/{name}' in kernel.operation), 1.0)
