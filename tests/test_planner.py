"""`mixcon plan`: its figures against arithmetic by hand, its refusals, its exit codes."""

import functools
import json
import math

import pytest

from mixcon_jax import config as configs
from mixcon_jax.cli import main
from mixcon_jax.errors import UserError
from mixcon_jax.models import accounting
from mixcon_jax.parallel.axes import AXES
from mixcon_jax.planner import plan as planner
from mixcon_jax.planner import programs, search, words
from mixcon_jax.planning import hardware
from tests.tiny import ROOT

SMALL = {
    'model.dim': 64, 'model.vocab_size': 512, 'model.num_blocks': 2, 'model.pattern': ('attention+mlp',),
    'model.attention.num_heads': 4, 'model.attention.num_kv_heads': 2, 'model.mlp.hidden_dim': 128, 'model.unroll': 1,
    'data.seq_len': 64, 'train.batch_size': 8,
}  # fmt: skip


def configuration(devices, options):
    config = configs.default()
    for key, value in (SMALL | dict(options)).items():
        configs.put(config, key, value)
    return configs.validate(config, devices)


@functools.cache
def planned(hosts, per_host, options=(), what='train'):
    """A plan with products by cuBLAS, on so many H100s."""
    job = {'target': 'h100', 'hosts': hosts, 'per_host': per_host, 'what': what, 'batch': 2, 'context': 0}
    return planner.plan(configuration(hosts * per_host, options), job, ['cublas'], 2**30)


# ----- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments, wanted',
    [
        (['--devices', 'h900:8'], "unknown GPU 'h900'; known: "),
        (['--devices', 'h100:16x0'], 'write h100:HOSTSxDEVICES, each at least 1'),
        (['--devices', 'h100:eight'], 'write h100:HOSTSxDEVICES, each at least 1'),
        (['--devices', 'h100:8', '--memory-limit', 'lots'], "--memory-limit 'lots' is no size"),
        (['--devices', 'h100:8', '--memory-limit', '0GiB'], "--memory-limit '0GiB' is no size"),
        (['--devices', 'h100:8', '--what', 'decode', '--batch', '0'], '--batch 0 must be at least 1'),
        (['--devices', 'h100:6', '--config.mesh.fsdp=4'], 'mesh'),
        (['--devices', 'h100:8', '--config.mesh.tensor=8'], 'mesh.tensor=8 must divide'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, wanted, capsys):
    with pytest.raises(SystemExit) as ended:
        main(['plan', '--config', f'{ROOT}/experiments/mixcon/nano.py', *arguments])
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and wanted in printed and printed.count('\n') == 1


def test_without_the_extra_it_says_which(monkeypatch):
    monkeypatch.setattr(planner.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='needs the extra "plan"'):
        planner.require_extra()


@pytest.mark.parametrize(
    'text, wanted', [('72GiB', 72 * 2**30), ('80 GB', 80 * 10**9), ('1.5gib', 3 * 2**29), ('123', 123)]
)
def test_sizes(text, wanted):
    assert planner.read_limit(text, 'h100') == wanted


def test_the_exit_code_says_whether_it_fits(tmp_path, capsys, monkeypatch):
    """The compiler is left out: `planned` has it."""
    monkeypatch.setattr(planner, 'compile_apart', lambda job: FOUND | {'products': job['products']})
    file = tmp_path / 'deep' / 'plan.json'
    for limit, code in (('1GiB', 0), ('1MiB', 3)):
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    'plan',
                    '--config',
                    f'{ROOT}/experiments/mixcon/nano.py',
                    '--devices',
                    'h100:1x4',
                    '--products',
                    'cublas',
                ]
                + ['--memory-limit', limit, '--json', str(file)]
            )
        assert (ended.value.code or 0) == code
        written = json.loads(file.read_text())
        assert written['fits'] == (code == 0) and written['margin'] == written['limit'] - written['peak']
        assert ('DOES NOT FIT' in capsys.readouterr().out) == bool(code)


FOUND = {
    'mesh': {'data': 1, 'fsdp': 4}, 'parameters': 10, 'gradients': 10, 'moments': 20, 'layout': [], 'replicated': {},
    'passed_over': [], 'rematerialisations': [], 'traced': 1.0,
    'model': {
        'total': 9, 'active': 9, 'embedding': 1, 'by_part': {'ffn': 9}, 'tokens': 4,
        'flops_per_token': 1.0, 'flops': 4.0,
    },
    'cublas': {
        'peak': 2**29, 'arguments': 30, 'activations': 0, 'temporaries': 5, 'largest': [], 'exchanges': [],
        'kernels': 1, 'gpu_kernels': [], 'compiled': 1.0,
        'estimate': {
            'compute': 1.0, 'memory': 1.0, 'exponentials': 1.0, 'nvlink': 1.0, 'network': 1.0, 'bound': 'memory',
            'hidden': 1.0, 'exposed': 1.0,
        },
    },
}  # fmt: skip


def stub(monkeypatch, small=2**20):
    """Compiling takes no time: less recomputation is faster and larger, more devices of tensor slower."""

    def compiled(job):
        config = job['config']
        kept = {'none': 4, 'selective': 2, 'block': 1}[config['model']['remat']] * config['mesh']['tensor']
        one = FOUND['cublas'] | {'peak': small * kept, 'estimate': FOUND['cublas']['estimate'] | {'hidden': 1 / kept}}
        return FOUND | {'cublas': one, 'mesh': config['mesh'], 'products': job['products']}

    monkeypatch.setattr(planner, 'compile_apart', compiled)


def test_a_search_plans_what_is_valid_and_finds_what_nothing_beats(monkeypatch):
    stub(monkeypatch)
    job = {'target': 'h100', 'hosts': 1, 'per_host': 4, 'what': 'train', 'batch': 1, 'context': 0}
    config = configs.default()
    for key, value in SMALL.items():
        configs.put(config, key, value)
    said = []
    found = search.search(config, job, ['cublas'], 3 * 2**20, 1000, said.append)
    assert found['left'] == 0 and len(said) == len(found['plans']) > 20
    assert all(math.prod(one['mesh'][axis] for axis in AXES) == 4 for one in found['plans'])
    assert not [one for one in found['plans'] if one['mesh']['tensor'] > 2], 'two key heads'
    best = {one['sets'].split('model.')[1].split()[0] for one in found['plans'] if one['best']}
    assert best == {'remat=block', 'remat=selective'} and found['fits']
    assert search.search(config, job, ['cublas'], 2**19, 3, said.append)['left'] == len(found['plans']) - 3
    lines = list(words.table(found))
    assert len(lines) == len(found['plans']) + 2 and lines[1].startswith('*') and lines[-2].startswith('!')


# ----- what is compiled ---------------------------------------------------------------------------------------------


def by_hand(options, split):
    """Bytes of float32 parameters on one device of fsdp: those with features are split along them."""
    model = configuration(split, options).model
    return sum(
        4 * math.prod(shape) // (split if 'embed' in axes else 1) for _, shape, axes in accounting.parameters(model)
    )


def test_a_plan_agrees_with_arithmetic():
    found = planned(1, 4, (('mesh.fsdp', 4),))
    split = by_hand({}, 4)
    assert found['parameters'] == found['gradients'] == split
    assert 2 * split <= found['moments'] <= 2 * split + 64  # and the optimizer's counts
    batch = 8 // 4 * 64 * (4 * 4 + 1)
    arguments = found['cublas']['arguments']
    # What the step does not read, positions without RoPE, is no argument.
    assert split + found['moments'] + batch / 2 <= arguments <= split + found['moments'] + batch + 4096
    assert arguments < found['cublas']['peak'] < 2**27 and found['fits']
    exchanged = {(one['kind'], one['axes'], one['hosts']): one for one in found['cublas']['exchanges']}
    assert {axes for _, axes, _ in exchanged} == {'fsdp'} and {hosts for *_, hosts in exchanged} == {1}
    assert not any(one['across'] for one in exchanged.values())
    # In two gathers a matrix is whole on every device, forward and backward, in the compute type, float32.
    matrices = 4 * 2 * 64 * (64 + 64 + 2 * 32 + 3 * 128)
    assert exchanged['all-gather', 'fsdp', 1]['bytes'] >= 2 * matrices
    assert found['model']['flops'] == accounting.flops_per_token(configuration(4, {}).model, 64) * 8 * 64
    assert found['cublas']['estimate']['bound'] in ('compute', 'memory', 'exponentials', 'nvlink', 'network')


@pytest.mark.slow
def test_memory_falls_with_devices_and_hosts_are_told_apart():
    one, four = planned(1, 1), planned(2, 2, (('mesh.fsdp', 2), ('mesh.data', 2)))
    eight = planned(1, 8, (('mesh.fsdp', 8),))
    assert one['parameters'] == by_hand({}, 1) and not one['cublas']['exchanges']
    assert four['parameters'] == by_hand({}, 2) and eight['parameters'] == by_hand({}, 8)
    hosts = {one['axes']: one['hosts'] for one in four['cublas']['exchanges']}
    assert hosts['fsdp'] == 1 and hosts['data'] == 2
    assert all((one['across'] > 0) == (one['hosts'] > 1) for one in four['cublas']['exchanges'])


@pytest.mark.slow
def test_twice_the_layers_are_little_more_to_compile():
    few, many = (planned(1, 1, (('model.num_blocks', blocks),))['cublas']['instructions'] for blocks in (4, 8))
    assert many < 1.3 * few


@pytest.mark.slow
def test_long_rows_have_no_square_array_and_no_whole_logits():
    length, vocab = 8192, 5003
    options = (
        ('data.seq_len', length),
        ('train.batch_size', 1),
        ('model.vocab_size', vocab),
        ('train.loss_chunk', 512),
    )
    found = planned(1, 1, (*options, ('model.remat', 'block'), ('model.dtype', 'bfloat16')))
    assert found['cublas']['largest_elements'] < length * vocab < length * length


@pytest.mark.slow
@pytest.mark.parametrize('what', ['prefill', 'decode'])
def test_generation_compiles(what):
    found = planned(1, 2, (('mesh.fsdp', 2), ('model.pattern', ('conba+mlp', 'attention+moe'))), what)
    assert found['fits'] and found['model']['tokens'] == (2 * 64 if what == 'prefill' else 2)
    assert found['gradients'] == found['moments'] == 0 < found['model']['state_bytes']


def test_a_compiler_that_ends_early_is_told(monkeypatch):
    monkeypatch.setattr(planner.sys, 'executable', '/bin/false')
    with pytest.raises(UserError, match='the compiler ended with code 1'):
        planner.compile_apart({'products': ['cublas']})


# ----- devices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', hardware.TARGETS)
def test_devices_agree_with_the_peaks_of_mfu(name):
    target = hardware.TARGETS[name]
    assert target.flops == hardware.peak_flops(target.name)
    assert target.network <= target.nvlink < target.bandwidth < target.flops


def test_rows_are_split_though_heads_are_as_many():
    assert programs._batch_axis((16, 16, 64, 128), 16) == 0
    assert programs._batch_axis((3, 16, 8), 16) == programs._batch_axis((), 1) == -1


def test_a_search_of_which_nothing_compiles_says_so(monkeypatch):
    monkeypatch.setattr(planner.sys, 'executable', '/bin/false')
    job = {'target': 'h100', 'hosts': 1, 'per_host': 1, 'what': 'train', 'batch': 1, 'context': 0}
    with pytest.raises(UserError, match='none of 2 candidates could be planned; the last: the compiler ended'):
        search.search(configs.default(), job, ['cublas'], 2**30, 2, lambda line: None)
