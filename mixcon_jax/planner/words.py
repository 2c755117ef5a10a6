"""A plan for people: what `mixcon plan` prints."""

from collections.abc import Iterator
from typing import Any

from mixcon_jax.units import memory, short


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
        yield f'warning   {name}, {memory(size)}, is whole on every device'
    for line in found['rematerialisations']:
        yield f'warning   {line}'
    kernels = sorted({name for each in found['products'] for name in found[each]['gpu_kernels']})
    yield f'compiled  as a {found["device"]} would choose by default; GPU kernels: {", ".join(kernels) or "none"}'
    for line in found['passed_over']:
        yield f'          {line}'
    yield from _resources(kernels, found['resources'])
    for name in found['products']:
        yield from _variant(found, name)
    verdict = 'fits' if found['fits'] else 'DOES NOT FIT'
    yield (
        f'memory    {verdict}: {memory(found["peak"])} at the peak of a limit of {memory(found["limit"])},'
        f' {memory(abs(found["margin"]))} {"to spare" if found["fits"] else "too many"}'
    )
    compiled = ', '.join(f'{found[name]["compiled"]:.0f} s ({name})' for name in found['products'])
    yield (
        f'took      {found["seconds"]:.0f} s, {found["cpu_seconds"]:.0f} s of CPU time and'
        f' {memory(found["compiler_memory"])} here: traced in {found["traced"]:.0f} s, compiled at once in {compiled}'
    )


def _resources(kernels: list[str], found: list[dict[str, Any]]) -> Iterator[str]:
    """What every kernel takes of a multiprocessor, or that nobody has said so."""
    for one in found:
        programs = f', {one["programs"]} programs, at most' if one['programs'] > 1 else ':'
        spilled = f'spills {one["spilled_bytes"]} bytes a thread' if one['spilled_bytes'] else 'no spills'
        yield (
            f'          {one["name"]}{programs} {one["registers"]} registers a thread,'
            f' {memory(one["shared_bytes"])} of shared memory a block, {spilled}'
        )
    if unknown := sorted(set(kernels) - {one['name'] for one in found}):
        yield f'          registers and shared memory not known, as ptxas has not reported: {", ".join(unknown)}'


def _variant(found: dict[str, Any], name: str) -> Iterator[str]:
    one = found[name]
    parts = {
        'parameters': found['parameters'], 'gradients': found['gradients'], 'moments': found['moments'],
        'state': found['state'], 'activations kept': one['activations'], 'other temporaries': one['temporaries'],
    }  # fmt: skip
    text = ', '.join(f'{part} {memory(size)}' for part, size in parts.items() if size)
    yield f'products by {name}: {memory(one["peak"])} a device at the peak: {text}'
    for array in one['largest'][:5]:
        where = ', '.join(['', *filter(None, [array['line'] or array['operation'][-70:]])])
        yield f'          {memory(array["bytes"])} {array["shape"]}{where}'
    for exchange in one['exchanges'][:8]:
        where = f'{exchange["hosts"]} hosts' if exchange['hosts'] > 1 else 'inside hosts'
        yield (
            f'          {exchange["kind"]} over {exchange["axes"]} ({where}): {exchange["count"]:,} a step,'
            f' {memory(exchange["bytes"])}'
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
    if guess['measured']:
        rates = ', '.join(f'{kernel} {rate / 1e12:.2g} TB/s' for kernel, rate in guess['measured'].items())
        yield f'          of it as fast as GPUs of this generation have run them: {rates}; all else at its peak'


def table(found: dict[str, Any]) -> Iterator[str]:
    """The lines of a search, the fastest plan first; a star marks those that none beats in both columns."""
    yield f'{"":2}{"":>3} {"GiB":>8} {"s a step":>10}  options'
    for number, one in enumerate(found['plans'], 1):
        mark = '*' if one['best'] else '' if one['fits'] else '!'
        yield f'{mark:2}{number:3} {one["peak"] / 2**30:8.2f} {one["seconds_a_step"]:10.3g}  {one["sets"]}'
    yield (
        f'* no other that fits is faster and smaller; ! does not fit into {memory(found["limit"])}; seconds are'
        f' estimates, not measured; {found["left"]} more candidates were left out (--search N plans N)'
    )
