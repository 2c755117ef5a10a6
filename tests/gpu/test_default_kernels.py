"""Which GPU kernels a MixCon step for an H100 gets by default: those that a card covers and no other.

Nothing runs: the step is lowered, and with the shipped cards compiled in `make test-all`. A process of its own does so
(`python -m tests.gpu.test_default_kernels`), as LLVM may abort it.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from kernels_pallas import cards
from tests.tiny import ROOT

KERNELS = {  # kernel: what its GPU programs are called
    'selective_scan': {'selective_scan_forward', 'selective_scan_backward'},
    'adaptive_gain': {'adaptive_gain_forward', 'adaptive_gain_backward', 'adaptive_gain_replay'},
    'causal_conv1d': {'causal_conv1d_backward'},
}
USED = {'selective_scan': 'scan', 'adaptive_gain': 'width32', 'causal_conv1d': 'silu'}  # the variants of this step
ALL = set().union(*KERNELS.values())


def printed(folder, *arguments: str) -> dict:
    """What `main` prints, with no cards but the shipped."""
    environment = {key: value for key, value in os.environ.items() if key != cards.TRUST}
    environment |= {cards.FOLDER: str(folder)}
    environment |= {'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    command = [sys.executable, '-m', 'tests.gpu.test_default_kernels', *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    return printed(tmp_path_factory.mktemp('no-cards'))


@pytest.mark.slow
def test_what_runs_by_default_compiles(found, tmp_path):
    assert printed(tmp_path, 'compiled')['compiled'] == found['shipped']


def test_the_shipped_cards_decide(found):
    verified = [
        kernel
        for kernel, variant in USED.items()
        if any(c.variant == variant and c.counts for c in cards.shipped(kernel))
    ]
    assert set(found['shipped']['programs']) == set().union(*(KERNELS[kernel] for kernel in verified))
    unverified = set(USED) - set(verified)
    assert all(any(kernel in warning for warning in found['shipped']['warnings']) for kernel in unverified)


def test_with_a_card_of_the_scan_alone_only_the_scan_runs(found):
    assert set(found['scan']['programs']) == KERNELS['selective_scan']
    told = found['scan']['warnings']
    assert any('matrix_gain runs' in text and 'has changed since a GPU verified it' in text for text in told)
    assert any('causal_conv1d runs' in text and 'crashes, on NVIDIA H200' in text for text in told)
    assert all('`python -m kernels_pallas.verify' in text for text in told)


def test_without_any_card_all_is_by_xla(found):
    assert found['none']['programs'] == []
    assert len(found['none']['warnings']) == 3  # one a kernel, not one a layer


def test_those_who_trust_get_all_and_no_warning(found):
    assert set(found['trusted']['programs']) == ALL and found['trusted']['warnings'] == []


def test_naming_an_unverified_kernel_runs_it(found):
    assert set(found['named']['programs']) == KERNELS['selective_scan']


def main() -> None:
    import dataclasses
    import warnings

    import jax

    from kernels_pallas import dispatch
    from mixcon_jax import config as configs
    from mixcon_jax.parallel.layout import batch_sharding
    from mixcon_jax.parallel.mesh import make_mesh
    from mixcon_jax.planning import compiling
    from mixcon_jax.step import BATCH, make_steps

    device = compiling.devices('h100')[0]

    def step(implementation: str = '', whole: bool = False, layers: int = 1) -> dict:
        """Programs of ours in a step of so many layers, lowered or wholly compiled, and what was warned of."""
        config = configs.default()
        config.model.update(dim=64, vocab_size=128, pattern=('conba',) * layers)
        config.model.ssm.implementation = implementation
        config.data.seq_len, config.train.batch_size = 256, 128
        config = configs.validate(config)
        mesh = make_mesh(config.mesh, [device])
        steps = make_steps(config, mesh)
        rows = batch_sharding(mesh)
        batch = {key: jax.ShapeDtypeStruct((128, 256), kind, sharding=rows) for key, kind in BATCH.items()}
        dispatch.warn_once.cache_clear()
        jax.clear_caches()
        with jax.default_device(device), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            lowered = steps.train_step.trace(steps.abstract_state, batch).lower(lowering_platforms=('cuda',))
            text = lowered.compile().as_text() if whole else lowered.as_text(debug_info=True)
        calls = ' '.join(line for line in text.splitlines() if 'mosaic_gpu' in line)
        programs = sorted(set(re.findall('|'.join(sorted(ALL)), calls)))
        return {'programs': programs, 'warnings': [str(w.message) for w in told if 'mosaic_gpu' in str(w.message)]}

    if 'compiled' in sys.argv[1:]:
        print(json.dumps({'compiled': step(whole=True)}))
        return
    found = {'shipped': step()}
    sample = cards.Card('', 'scan', cards.VERIFIED, 'NVIDIA H200', '9.0', '', jax.__version__, '', '', '', '')
    current = lambda kernel, **values: dataclasses.replace(
        sample, **{'kernel': kernel, 'variant': USED[kernel], 'sources': cards.source_hash(kernel)} | values
    )
    known = {
        'selective_scan': [current('selective_scan')],
        'adaptive_gain': [current('adaptive_gain', sources='of other lines')],
        'causal_conv1d': [current('causal_conv1d', outcome='crashes')],
    }
    for name, shipped in (('scan', known.__getitem__), ('none', lambda kernel: [])):
        cards.shipped = shipped
        cards.forget()
        found[name] = step(layers=2 if name == 'none' else 1)
    found['named'] = step('mosaic_gpu')
    os.environ[cards.TRUST] = '1'
    found['trusted'] = step()
    print(json.dumps(found))


if __name__ == '__main__':
    main()
