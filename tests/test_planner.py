"""`mixcon plan`: its figures against arithmetic by hand, its refusals, its exit codes."""

import io
import json
import math
import pathlib
import re
import sys

import pytest

from kernels_pallas import cards
from mixcon_jax import config as configs
from mixcon_jax.cli import main
from mixcon_jax.errors import UserError
from mixcon_jax.models import accounting
from mixcon_jax.parallel.axes import AXES
from mixcon_jax.planner import compiled, picture, search, words
from mixcon_jax.planner import plan as planner
from mixcon_jax.planning import hardware, resources
from mixcon_jax.planning.estimate import estimate
from mixcon_jax.planning.hlo import Kernel
from tests.planning import FOUND, SMALL, configuration, planned, stub
from tests.tiny import ROOT

# ----- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments, wanted',
    [
        (['--devices', 'h900:8'], "unknown GPU 'h900'; known: "),
        (['--devices', 'h100:16x0'], 'write h100:HOSTSxDEVICES, each at least 1'),
        (['--devices', 'h100:eight'], 'write h100:HOSTSxDEVICES, each at least 1'),
        (['--devices', 'h100:8', '--json', '/'], '--json / is a folder; name a file'),
        (['--devices', 'h100:8', '--json', '/dev/null/x.json'], '--json /dev/null/x.json cannot be written'),
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


def test_a_picture_shows_every_plan_and_joins_those_that_nothing_beats():
    plan = lambda peak, seconds, best=False: {
        'peak': peak * 2**20, 'seconds_a_step': seconds, 'best': best, 'fits': peak <= 3, 'sets': f'mesh.data={peak}',
    }  # fmt: skip
    plans = [plan(3, 1.0, True), plan(2, 2.0, True), plan(3, 2.5), plan(1, 4.0, True), plan(4, 0.5)]
    found = {'plans': plans, 'limit': 3 * 2**20, 'left': 0, 'fits': True}
    joined, *markers, limit = picture.figure(found).axes[0].lines
    at = lambda one: (one['peak'] / 2**30, one['seconds_a_step'])
    assert joined.get_xydata().tolist() == [list(at(plans[number])) for number in (3, 1, 0)], 'the smallest first'
    assert [tuple(line.get_xydata()[0]) for line in markers] == list(map(at, plans))
    assert limit.get_xdata()[0] == 3 / 2**10
    drawn = picture.draw(found, 'svg')
    assert b'limit 3.00 MiB' in drawn
    assert all(f'>{number} {one["sets"]}<'.encode() in drawn for number, one in enumerate(plans, 1))


def test_a_search_writes_its_picture(tmp_path, monkeypatch, capsys):
    stub(monkeypatch)
    arguments = [
        'plan',
        '--config',
        f'{ROOT}/experiments/mixcon/nano.py',
        '--devices',
        'h100:2',
        '--products',
        'cublas',
    ]
    for wrong in (['--picture', 'a.svg'], ['--search', '2', '--picture', 'a.pdf']):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *wrong])
        assert ended.value.code == 2 and 'is of a --search, and its name ends in' in capsys.readouterr().err
    file = tmp_path / 'new' / 'plans.svg'
    with pytest.raises(SystemExit) as ended:
        main([*arguments, '--search', '2', '--picture', str(file)])
    assert not ended.value.code and file.read_text().startswith('<?xml') and not list(file.parent.glob('*.tmp'))


# ----- what kernels take ---------------------------------------------------------------------------------------------

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'scan_forward_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for scan_forward_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 92 registers, used 2 barriers, 1 bytes smem
something else that is said
ptxas info    : Compiling entry function 'scan_forward_mosaic_gpu_kernel' for 'sm_90a'
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 80 registers, used 2 barriers, 1 bytes smem, 8 bytes cumulative stack size
ptxas info    : Compiling entry function 'fusion_3' for 'sm_90a'
    8 bytes stack frame, 64 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 255 registers
"""


def test_what_kernels_take_is_read_and_said():
    (found,) = resources.summary({'scan_forward': 4096, 'another': 1}, PTXAS)
    assert found == resources.Resources('scan_forward', 2, 92, 4096, 28)
    laid_out = 'smem_scratch_bytes=66560, barrier_counts=Counter({Barrier(arrival_count=4, num_barriers=2): 1})'
    assert resources.shared_bytes(f'Resources({laid_out})') == 66560 + 16
    one, unknown = words._resources(['another', 'scan_forward'], [vars(found)])
    taken = '92 registers a thread, 4.00 KiB of shared memory a block, spills 28 bytes a thread'
    assert one.strip() == f'scan_forward, 2 programs, at most {taken}'
    assert unknown.endswith('not known, as ptxas has not reported: another')


def test_kernels_that_cards_have_timed_count_as_fast_as_they_ran():
    rates, target = compiled.measured(9), hardware.TARGETS['h100']
    assert set(rates) == set(compiled.BY_BYTES) and not compiled.measured(8), 'no card of an A100 has times'
    assert all(1e11 < rate < target.bandwidth for rate in rates.values())
    operation = 'jit(train)/selective_scan_forward/mpmd_map'
    kernels = [Kernel('a', 'mosaic_gpu_v2', 10**9, 3, 'f32[1]', operation=operation), Kernel('b', 'Loop', 10**9, 1, '')]
    guess = lambda rates: estimate(kernels, [], target, flops=0, exponentials=0, measured=rates)
    scan = rates['selective_scan']
    assert guess(rates)['measured'] == {'selective_scan': scan} and guess({})['measured'] == {}
    assert guess(rates)['hidden'] == pytest.approx(3e9 / scan + 1e9 / target.bandwidth)
    assert guess({})['hidden'] == pytest.approx(4e9 / target.bandwidth)


@pytest.mark.slow
def test_kernels_of_a_compiled_step_are_all_reported_on(monkeypatch):
    monkeypatch.setenv(cards.TRUST, '1')
    options = {'model.pattern': ('mamba+mlp',), 'model.dim': 128, 'model.dtype': 'bfloat16'}
    found = planned(1, 1, tuple(options.items()))
    assert {one['name'] for one in found['resources']} == set(found['cublas']['gpu_kernels'])
    assert {'selective_scan_forward', 'selective_scan_backward'} <= set(found['cublas']['gpu_kernels'])
    for one in found['resources']:
        assert 16 < one['registers'] <= 255 and 1024 < one['shared_bytes'] < 227 * 2**10 and not one['spilled_bytes']
    assert set(found['cublas']['estimate']['measured']) == {'selective_scan', 'causal_conv1d'}


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


def test_the_compiling_process_ends_with_the_one_that_asked(monkeypatch):
    monkeypatch.setattr('sys.stdin', io.StringIO(json.dumps({'parent': 7})))
    monkeypatch.setattr(compiled, 'end_with', sys.exit)
    with pytest.raises(SystemExit, match='7'):
        compiled.main()


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


@pytest.mark.parametrize('file', sorted((pathlib.Path(hardware.__file__).parent / 'devices').glob('*.toml')), ids=str)
def test_devices_say_where_their_figures_are_from(file):
    assert re.match(r'# NVIDIA .*\. Source: \w.*(Datasheet|product page)', file.read_text())


def test_a_search_of_which_nothing_compiles_says_so(monkeypatch):
    monkeypatch.setattr(planner.sys, 'executable', '/bin/false')
    job = {'target': 'h100', 'hosts': 1, 'per_host': 1, 'what': 'train', 'batch': 1, 'context': 0}
    with pytest.raises(UserError, match='none of 2 candidates could be planned; the last: the compiler ended'):
        search.search(configs.default(), job, ['cublas'], 2**30, 2, lambda line: None)
