"""A plan for people: what `mixcon plan` prints."""

from collections.abc import Iterator
from typing import Any

from mixcon_jax.units import short

GIB = 2**30


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The lines of a plan, from what JSON has."""
    devices = found['hosts'] * found['per_host']
    axes = ' x '.join(f'{axis} {size}' for axis, size in found['mesh'].items() if size > 1) or 'no axis split'
    model = found['model']
    yield f'plan      {found["name"] or "unnamed"}, {found["what"]}, on {devices} x {found["device"]}: {axes}'
    tokens = short(model['tokens'])
    yield (
        f'model     {model["total"]:,} parameters, {model["active"]:,} active;'
        f' {model["flops_per_token"] / 1e9:.2f} GFLOP a token, {model["flops"]:.3g} FLOP a step of {tokens} tokens'
    )
    yield f'          {", ".join(f"{name} {short(size)}" for name, size in sorted(model["by_part"].items()))}'
    for i, line in enumerate(found['layout']):
        yield f'{"" if i else "layout":<10}{line}'
    for name, size in found['replicated'].items():
        yield f'warning   {name}, {size / GIB:.2f} GiB, is whole on every device'
    for line in found['rematerialisations']:
        yield f'warning   {line}'
    kernels = sorted({name for each in found['products'] for name in found[each]['gpu_kernels']})
    yield f'compiled  as a {found["device"]} would choose by default; GPU kernels: {", ".join(kernels) or "none"}'
    for line in found['passed_over']:
        yield f'          {line}'
    for name in found['products']:
        yield from _variant(found, name)
    verdict = 'fits' if found['fits'] else 'DOES NOT FIT'
    yield (
        f'memory    {verdict}: {found["peak"] / GIB:.2f} GiB at the peak of a limit of {found["limit"] / GIB:.2f} GiB,'
        f' margin {found["margin"] / GIB:.2f} GiB'
    )
    compiled = ', '.join(f'{found[name]["compiled"]:.0f} s ({name})' for name in found['products'])
    yield (
        f'took      {found["seconds"]:.0f} s, {found["compiler_memory"] / GIB:.1f} GiB here: traced in'
        f' {found["traced"]:.0f} s, compiled in {compiled}'
    )


def _variant(found: dict[str, Any], name: str) -> Iterator[str]:
    one = found[name]
    parts = {
        'parameters': found['parameters'], 'gradients': found['gradients'], 'moments': found['moments'],
        'activations kept': one['activations'], 'other temporaries': one['temporaries'],
    }  # fmt: skip
    text = ', '.join(f'{part} {size / GIB:.2f}' for part, size in parts.items() if size)
    yield f'products by {name}: {one["peak"] / GIB:.2f} GiB a device at the peak: {text}'
    for array in one['largest'][:5]:
        yield f'          {array["bytes"] / GIB:6.2f} GiB {array["shape"]}, {array["line"] or array["operation"][-70:]}'
    for exchange in one['exchanges'][:8]:
        where = f'{exchange["hosts"]} hosts' if exchange['hosts'] > 1 else 'inside hosts'
        yield (
            f'          {exchange["kind"]} over {exchange["axes"]} ({where}): {exchange["count"]:,} a step,'
            f' {exchange["bytes"] / GIB:.2f} GiB'
        )
    guess = one['estimate']
    alone = ', '.join(
        f'{part} {guess[part]:.3g}' for part in ('compute', 'memory', 'exponentials', 'nvlink', 'network')
    )
    share = found['model']['flops'] / (found['hosts'] * found['per_host'] * found['peak_flops'])
    most = f'{share / guess["hidden"]:.0%} to {share / guess["exposed"]:.0%}'
    yield (
        f'          estimate, not measured: {guess["hidden"]:.3g} s a step if exchanges hide behind kernels,'
        f' {guess["exposed"]:.3g} s if none does (MFU at most {most})'
        f'; bound by {guess["bound"]}; seconds alone: {alone}'
    )
