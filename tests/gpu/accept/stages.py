"""The stages: what each does in its own process, by name, and in which order they run."""

import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from kernels_pallas import cards, verify
from tests.gpu.accept.runner import Stage

Say = Callable[[dict[str, Any]], None]

CASES_A_PROCESS = 3  # of a kernel's variant
LAYERS = (  # of tests/models/cases.py, a process a group
    ('attention', 'attention_rope', 'mlp', 'moe', 'moe_grouped', 'moe_bias', 'moe_dense'),
    ('mamba', 'mamba_norms', 'conba_code'),
    ('conba', 'conba_diag'),
    ('conba_companion', 'conba_feedback_companion'),
    ('conba_paper',),
    ('mamba2', 'retnet', 'gla', 'rwkv4', 'attention_window'),
    ('hyena', 'hyena_modal'),
    ('rwkv6', 'rwkv7'),
    ('moe_mamba', 'moe_mamba_all', 'moe_switch'),
    ('large_kernel', 'series_mlp', 'rwkv_channel_mix'),
)
CHANGED = ('dense 75M, free', 'dense 75M, scatter', 'dense 856M, free', '2:6 Conba, 8 experts, free')  # of the ladder
TINY_LAYERS = (('mamba',),)
TRAINED = (('conba', 'float32'), ('conba', 'bfloat16'), ('conba_paper', 'float32'), ('conba_code', 'float32'))


# ----------------------------------------------------------------------------------------------------------- in order
def kernels(cpu: bool) -> list[Stage]:
    """(a) Every kernel and variant against float64; a process for a few cases."""
    found = []
    for part in verify.parts(cards.kernels()):
        count = len(verify.chosen(part, small=cpu))
        processes = -(-count // CASES_A_PROCESS)
        found += [Stage(f'kernel:{part.kernel}:{part.variant}:{i}/{processes}', 240) for i in range(processes)]
    return found


def layers(cpu: bool) -> list[Stage]:
    """(b) Every mixer and FFN as a layer against the CPU."""
    return [Stage(f'layers:{",".join(group)}', 300) for group in (TINY_LAYERS if cpu else LAYERS)]


def training(cpu: bool) -> list[Stage]:
    """(c) Whole steps against the CPU's losses, and stopping and going on; (e) the quickstart."""
    steps = [Stage(f'train:{preset}:{dtype}', 300) for preset, dtype in (TRAINED[:1] if cpu else TRAINED)]
    sorted_too = [] if cpu else [Stage('run:resume-sorted', 240)]
    return [*steps, Stage('run:resume', 240), Stage('run:quickstart', 300), *sorted_too]


def ladder(cpu: bool) -> list[Stage]:
    """(d) The speed of whole steps; they say `ready` once compiled, and wait for a line before they time."""
    from tests.benchmarks.ladder import PLAIN

    names = [*PLAIN, *CHANGED]
    return [Stage(f'speed:{name}', 600) for name in (names[:1] if cpu else names)]


def times(cpu: bool) -> list[Stage]:
    """The times of the kernels against their floors; they wait as the ladder's do."""
    return [] if cpu else [Stage(f'times:{kernel}', 400) for kernel in cards.kernels()]


def tiles(cpu: bool) -> list[Stage]:
    """Tile sizes beside those in use: the first to go without when time is short. They wait as the ladder's do."""
    names = ('grouped_matmul', 'attention', 'selective_scan')  # as accept.tiles.KERNELS, which imports them all
    return [] if cpu else [Stage(f'tiles:{kernel}', 300) for kernel in names]


def in_order(cpu: bool) -> dict[str, list[Stage]]:
    """All of them, by kind."""
    kinds = (kernels, training, layers, ladder, times, tiles)
    return {kind.__name__: kind(cpu) for kind in kinds}


# ------------------------------------------------------------------------------------------------- in a stage's process
def perform(name: str, cpu: bool, say: Say) -> bool:
    """Runs one stage; whether all was right. `say` takes findings, those that went wrong with `failed`."""
    good = True

    def heard(found: dict[str, Any]) -> None:
        nonlocal good
        good = good and 'failed' not in found
        say(found)

    kind, _, rest = name.partition(':')
    _STAGES[kind](rest, cpu, heard)
    return good


def _device(rest: str, cpu: bool, say: Say) -> None:
    import jax
    import jaxlib

    facts: dict[str, Any] = {'device': jax.devices()[0].device_kind, 'compute_capability': '0.0', 'driver': ''}
    say((facts if cpu else verify.device_facts()) | {'jax': jax.__version__, 'jaxlib': jaxlib.__version__})


def _kernel(rest: str, cpu: bool, say: Say) -> None:
    kernel, variant, share = rest.split(':')
    index, count = map(int, share.split('/'))
    interpret = None
    if cpu:
        from tests.kernels_pallas import interpreted

        interpret = interpreted.parameters()
    verify.run_part(verify.Part(kernel, variant), say, interpret, (index, count))


def _times(rest: str, cpu: bool, say: Say) -> None:
    gate = _gate(say)
    verify.run_part(verify.Part(rest, ''), say, ready=lambda: gate(0.0))


def _tiles(rest: str, cpu: bool, say: Say) -> None:
    from tests.gpu.accept import tiles

    tiles.measure(rest, say, _gate(say))


def _layers(rest: str, cpu: bool, say: Say) -> None:
    from tests.gpu.accept import layers

    for name in rest.split(','):
        layers.check(name, say)


def _train(rest: str, cpu: bool, say: Say) -> None:
    from tests.gpu.accept import steps

    preset, dtype = rest.split(':')
    steps.check(preset, dtype, cpu, say)


def _run(rest: str, cpu: bool, say: Say) -> None:
    from tests.gpu.accept import runs
    from tests.tiny import write_corpus

    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        if rest == 'resume' and cpu:
            runs.resume(folder, say, 400, 5, model__pattern=('mamba',))
        elif rest == 'resume':
            runs.resume(folder, say, 200, 30)
        elif rest == 'resume-sorted':  # whether two processes agree without what `train.deterministic` asks of XLA
            options = {'model__embedding_gradient': 'sorted', 'train__deterministic': False}
            runs.resume(folder, say, 200, 30, **options)
        else:
            small = ['train.steps=3', 'optim.warmup_steps=1', 'model.dim=32', 'data.seq_len=32', 'train.loss_chunk=32']
            small += [f'data.sources={write_corpus(folder / "corpus")}', 'data.tokenizer_vocab_size=300']
            small += ['model.pattern=mamba+mlp']
            runs.quickstart(folder, say, [f'--config.{option}' for option in small] if cpu else [])


def _speed(rest: str, cpu: bool, say: Say) -> None:
    from tests.benchmarks import ladder

    found = ladder.measure(rest, tiny=cpu, compiled=_gate(say))
    say({'rung': rest} | found | ({} if found['finite'] else {'failed': f'{rest}: the loss is not finite'}))


def _gate(say: Say) -> Callable[[float], None]:
    """What a stage calls once it has compiled, with the seconds that took: waits until nothing else is timed."""

    def compiled(seconds: float) -> None:
        say({'ready': round(seconds, 1)})
        if not sys.stdin.readline():
            sys.exit('nobody is there to say when to go on')

    return compiled


_STAGES = {
    'device': _device, 'kernel': _kernel, 'times': _times, 'tiles': _tiles, 'layers': _layers, 'train': _train,
    'run': _run, 'speed': _speed,
}  # fmt: skip
