"""`mixcon watch`: what it makes of records as they are written, cut, replaced and deleted, and what it shows."""

import contextlib
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from mixcon_jax import cli
from mixcon_jax.errors import UserError
from mixcon_jax.runs.run import run_folders
from mixcon_jax.watching import cells, charts
from mixcon_jax.watching import watch as watching
from mixcon_jax.watching.details import details
from mixcon_jax.watching.follow import Runs, WatchedRun

ROOT = Path(__file__).resolve().parents[1]
PATTERN = ['conba+mlp', 'conba+moe', 'attention+mlp']
STARTED = {'kind': 'run', 'step': 0, 'time': 1000.0, 'event': 'started'}


def train(step, time, **values):
    """A training record; the loss is 6 at step 0 and falls to 2."""
    record = {'kind': 'train', 'step': step, 'time': time, 'loss': 2 + 4 / (1 + step / 10), 'grad_norm': 0.5}
    record |= {'learning_rate': 1e-3, 'tokens_seen': 100 * step, 'tokens_per_second': 1234.5, 'goodput': 0.75}
    return record | {'time_shares': {'startup': 0.05, 'compile': 0.1, 'data': 0.0, 'evaluation': 0.1}} | values


def scores(step, time, loss=3.0):
    return {'kind': 'eval', 'step': step, 'time': time, 'loss': loss, 'bits_per_byte': 1.5, 'tokens': 9, 'bytes': 18}


def event(name, step, time):
    """A start or an end; of one that is done, with the scores and the fingerprint that make it so."""
    record = {'kind': 'run', 'step': step, 'time': time, 'event': name}
    return scores(step, time) | record | {'fingerprint': 'f'} if name == 'done' else record


def steps(first, last, time=1010.0, pace=0.5):
    """A record every 10 steps, from ``time`` on, ``pace`` seconds a step."""
    return [train(step, time + pace * (step - first)) for step in range(first, last + 1, 10)]


def text_of(records):
    return ''.join(json.dumps(record) + '\n' for record in records)


def write(folder, records, name='a', seed=0, steps=100, num_blocks=1):
    """Writes a run's folder by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    model = {'pattern': PATTERN, 'num_blocks': num_blocks, 'dim': 64}
    config = {'name': name, 'seed': seed, 'train': {'steps': steps}, 'model': model}
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'metrics.jsonl').write_text(text_of(records))
    return folder


def append(folder, *records):
    with open(folder / 'metrics.jsonl', 'a') as file:
        file.write(text_of(records))


def opened(folder, *args, **kwargs):
    run = WatchedRun(write(folder, *args, **kwargs))
    assert run.update()
    return run


def known(run):
    """Everything a run knows from its records."""
    curves = {name: curve.points for name, curve in run.curves.items()}
    return run.train, run.scores, run.event, run.step, run.last_saved, run.seen, curves, run.seconds_per_step()


def shown(renderable, width):
    """What a terminal of that width shows, as text; no line may be longer."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(renderable)
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    return text


RUNNING = [STARTED, *steps(1, 31)]  # the newest record is of second 1025, they come every 5 seconds


# ----- what is shown ------------------------------------------------------------------------------------------------


@pytest.fixture
def several(tmp_path):
    """A run of each state but one, in folders of their own."""
    write(tmp_path / 'a' / 'seed-0', [*RUNNING, scores(31, 1026, loss=3.25)], name='2:6')
    write(tmp_path / 'a' / 'seed-1', [*RUNNING, event('done', 100, 1026) | {'seconds': 125}], name='2:6', seed=1)
    write(tmp_path / 'b', [STARTED | {'time': 1025.0}], name='8:0 [RoPE]')
    write(tmp_path / 'c', [*RUNNING, event('aborted', 31, 1026)], name='diverged')
    write(tmp_path / 'd', [train(5, 700, loss=None)], name='killed')
    return Runs([tmp_path]).update()


def test_the_table_at_full_width(several):
    text = shown(watching.overview(several, 1027, 140), 140)
    assert '1 starting  1 running  1 silent  1 aborted  1 done' in text
    for title in ('run', 'seed', 'state', 'step', 'loss', 'held out', 'tokens/s', 'left', 'goodput'):
        assert title in text.splitlines()[1]
    assert 'MFU' not in text, 'where it is known'
    line = {row.split()[0]: row.split() for row in text.splitlines()[2:]}
    running = next(row for row in text.splitlines() if 'running' in row and '2:6' in row)
    assert running.split() == ['2:6', '0', 'running', '31/100', '━' * 10, '2.9756', '3.2500', '1.23k', '32s', '75', '%']
    assert '[RoPE]' in line['8:0'] and '0/100' in line['8:0'] and '–' in line['8:0']
    assert '–' in line['killed'] and 'silent for 5m 27s' in text
    assert '(2m 05s)' in text


def test_a_run_took_what_its_starts_took_together(tmp_path):
    stopped, done = event('stopped', 31, 1026) | {'seconds': 100}, event('done', 100, 1099) | {'seconds': 25}
    run = opened(tmp_path, [*RUNNING, stopped, STARTED | {'event': 'resumed', 'step': 31}, *steps(41, 91, 1030), done])
    assert run.seconds == 125 and cells.time_left(run, 1100) == '(2m 05s)'


def test_a_chart_of_what_there_is(tmp_path):
    """Scores before the first record of training; losses that are not finite, or of any size."""
    run = opened(tmp_path / 'a', [STARTED, scores(2, 1001), scores(4, 1002)])
    assert '●' in shown(details(run, 1003, 80, 8), 80)
    run = opened(tmp_path / 'b', [STARTED, train(1, 1001, loss=None)])
    assert 'no loss was finite' in shown(details(run, 1003, 80, 8), 80)
    run = opened(tmp_path / 'c', [STARTED, train(1, 1001, loss=6e30), train(2, 1002, loss=12345.0)])
    text = shown(details(run, 1003, 80, 8), 80)
    assert '6.0e+30 ' in text and '1.2e+04 ' in text


def test_a_narrow_table_keeps_what_matters_most(several):
    text = shown(watching.overview(several, 1027, 60), 60)
    title = text.splitlines()[1].split()
    assert title[:5] == ['run', 'seed', 'state', 'step', 'loss'] and 'goodput' not in title and 'tokens/s' not in title
    assert 'silent for 5m 27s' in text and '31/100' in text and '2.9756' in text
    for width in (20, 30, 40):
        assert 'aborted' in shown(watching.overview(several, 1027, width), width) or width == 20


def test_mfu_has_a_column_where_it_is_known(tmp_path):
    runs = [opened(tmp_path / name, [STARTED, train(1, 1001, **mfu)]) for name, mfu in (('a', {'mfu': 0.4}), ('b', {}))]
    text = shown(watching.overview(runs, 1002, 140), 140)
    assert 'MFU' in text and '40 %' in text


def test_runs_of_one_name_and_seed_are_told_apart_by_their_folders(tmp_path):
    runs = [opened(tmp_path / name, RUNNING) for name in ('x', 'y')]
    text = shown(watching.overview(runs, 1026, 200), 200)
    assert str(tmp_path / 'x') in text and str(tmp_path / 'y') in text


def test_more_runs_than_lines_show_the_active_ones_first(tmp_path):
    folders = [tmp_path / f'{number:02d}' for number in range(30)]
    for place, folder in enumerate(folders):
        ended = [event('done', 100, 1026)] if place < 25 else []
        write(folder, [*RUNNING, *ended], name=f'arm-{place}')
    runs = Runs([tmp_path]).update()
    for height in (10, 20):
        text = shown(watching.view(runs, 1026, 80, height), 80)
        lines = text.splitlines()
        assert len(lines) == height and lines[-1] == f'and {30 - (height - 3)} more'
        assert [line.split()[0] for line in lines[2:7]] == [f'arm-{number}' for number in range(25, 30)]
    whole = shown(watching.view(runs, 1026, 80), 80)
    assert 'arm-24' in whole and 'gradient norm' not in whole
    high = shown(watching.view(runs, 1026, 80, 60), 80)
    assert 'arm-24' in high and 'gradient norm' in high and len(high.splitlines()) <= 60


STATS = {
    'layer_0/alpha': [0.125, 0.25], 'layer_0/gain_norm': [1.5, 2.5], 'layer_1/gain_norm': [0.75, None],
    'layer_1/moe_dropped': [0.0, 0.02], 'layer_1/moe_entropy': [1.25, 1.0],
    'layer_1/moe_load': [[0.2, 0.3, 0.25, 0.25], [0.03, 0.47, 0.25, 0.25]],
}  # fmt: skip


@pytest.mark.parametrize('width', [60, 140])
def test_one_run_in_detail(tmp_path, width):
    records = [STARTED, *steps(1, 31), scores(31, 1026), {'kind': 'checkpoint', 'step': 21, 'time': 1027}]
    records += [train(41, 1030, stats=STATS, skipped=2, bad_steps=0)]
    run = opened(tmp_path / 'run', records, name='hybrid', num_blocks=2)
    text = shown(watching.view([run], 1031, width, 50), width)
    for words in (
        'hybrid · seed 0',
        'step 41/100',
        'running',
        'learning rate',
        '0.001',
        'gradient norm',
        '●',
        'step 41',
    ):
        assert words in text
    assert '1.5000 bits per byte at step 31' in text and 'checkpoint at step 21' in text and '4.1k seen' in text
    assert 'steps 75 %' in text and 'compile 10 %' in text and 'data' not in text.split('experts')[0].split('■')[-1]
    assert 'skipped steps' in text
    # Layer 1 of the second block is layer 4 of 6.
    assert 'share of tokens, 25 % is even' in text
    rows = [line.split('layer ')[1].split() for line in text.splitlines() if 'layer ' in line]
    bars = ['▃▃', '▅▅', '▄▄', '▄▄'] if width > 60 else ['▃▅▄▄']
    assert [row[0] for row in rows] == ['1', '4', '0', '1', '3', '4']
    assert rows[0][1:] == ['20', '%', 'to', '30', '%', 'entropy', '1.25', *bars]
    assert ' '.join(rows[1]).startswith('4 3.0 % to 47 % entropy 1.00 dropped 2.0 %')
    gains = {row[0]: row[1:] for row in rows[2:]}
    assert gains == {'0': ['1.5', '0.125'], '3': ['2.5', '0.25'], '1': ['0.75', '–'], '4': ['–', '–']}


def test_of_many_layers_the_least_even_and_the_range_are_shown(tmp_path):
    uneven = [[1 / 64] * 63 + [1 / 64 + layer / 100] for layer in range(20)]
    stats = {'layer_1/moe_load': uneven, 'layer_0/gain_norm': [float(layer) for layer in range(20)]}
    run = opened(tmp_path / 'run', [STARTED, train(1, 1001, stats=stats)], num_blocks=20)
    for width in (60, 140):
        text = shown(details(run, 1002, width, 6), width)
        assert 'worst 8 of 20 layers' in ' '.join(text.split())
        assert 'layer 58' in text and 'layer 1 ' not in text
        assert 'Conba: 20 layers' in text
        rows = {line.split()[-2]: line.split()[-1] for line in text.splitlines() if line.split()[-2:-1]}
        assert (rows['least'], rows['mean'], rows['greatest']) == ('0', '9.5', '19')


def test_what_a_layer_does_not_declare_is_shown_all_the_same(tmp_path):
    """A layer of another version's run, or one whose class is not here; and without a pattern, all that is known."""
    stats = {'layer_0/size': [1.5], 'layer_0/gain_norm': [2.5]}
    run = opened(tmp_path / 'run', [STARTED, train(1, 1001, stats=stats)])
    text = shown(details(run, 1002, 80, 6), 80)
    assert 'Conba: gain and step' in text and 'statistics' in text and 'size' in text and '1.5' in text
    run.configuration = {}
    assert 'Conba: gain and step' in shown(details(run, 1002, 80, 6), 80)
    run.configuration = {'model': {'pattern': ['local+experts', 3], 'layers': {'local': {'kind': 'attention'}, 'x': 3}}}
    text = shown(details(run, 1002, 80, 6), 80)
    assert 'Conba' not in text and 'gain norm' in text


def test_a_task_shows_accuracy_instead_of_bits_per_byte(tmp_path):
    answers = scores(1, 1002, 0.5) | {'accuracy': 0.875, 'bits_per_byte': None, 'bytes': 0}
    run = opened(tmp_path / 'run', [STARTED, train(1, 1001), answers])
    assert 'accuracy 0.8750 at step 1' in shown(details(run, 1003, 80, 6), 80)


def test_a_run_without_a_step_can_be_shown(tmp_path):
    for records in ([], [STARTED], [STARTED, train(1, 1001, loss=None, grad_norm=None)]):
        run = opened(tmp_path / 'run', records)
        for width in (20, 60, 140):
            shown(watching.view([run], 1001, width, 24), width)


def test_the_details_stay_with_one_run_while_it_runs(tmp_path):
    first, second = opened(tmp_path / 'a', RUNNING), opened(tmp_path / 'b', [*RUNNING, train(41, 1030)])
    assert watching.most_active([first, second], 1031) is second
    assert watching.most_active([first, second], 1031, first) is first
    append(first.path, event('done', 100, 1040))
    first.update()
    assert watching.most_active([first, second], 1041, first) is second
    assert watching.most_active([first], 1041, second) is first


# ----- characters and words -----------------------------------------------------------------------------------------


def test_charts():
    assert charts.sparkline([(x, x) for x in range(8)], 8) == charts.BARS
    assert charts.sparkline([(x, 1.0) for x in range(100)], 5) == '▁▁▁▁▁'
    assert charts.sparkline([], 5) == ''
    assert charts.bars([0.5, 0.25, 0.0, float('nan')], 0.5) == '█▄▁ '
    assert charts.means([1, 2, 3, 4, 5], 2) == [1.5, 4]
    # A falling diagonal through 2 x 1 cells of 2 x 4 dots.
    assert charts.braille([(0, 1), (1, 0)], 2, 1, (0, 1), (0, 1)) == ['⠑⢄']
    lines = charts.braille([(x, x % 7) for x in range(100)], 30, 5, (0, 99), (0, 3))
    assert [len(line) for line in lines] == [30] * 5, 'what lies above the range is drawn at its edge'
    low, high = charts.span([(x, 100 if x == 0 else x / 100) for x in range(100)])
    assert low == 0.01 and high < 1
    assert charts.span([(0, 2.0)]) == (1.5, 2.5)


def test_shares_in_words():
    assert [cells.percent(share) for share in (0, 0.004, 0.0994, 0.0996, 1)] == [
        '0 %',
        '0.4 %',
        '9.9 %',
        '10 %',
        '100 %',
    ]


# ----- the command --------------------------------------------------------------------------------------------------


def command(*arguments):
    return [sys.executable, '-m', 'mixcon_jax.cli', 'watch', *map(str, arguments)]


def test_a_snapshot_loads_neither_jax_nor_numpy(tmp_path):
    write(tmp_path / 'run', RUNNING, name='quick')
    code = (
        'import sys\nfrom mixcon_jax import cli\ntry:\n'
        f'    cli.main(["watch", {str(tmp_path)!r}, "--once"])\nexcept SystemExit as end:\n'
        '    print(end.code, sorted({"jax", "numpy", "flax"} & set(sys.modules)))'
    )
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'quick' in result.stdout and result.stdout.splitlines()[-1] == '0 []', result.stderr


def test_what_is_no_terminal_gets_one_snapshot(tmp_path, capsys):
    write(tmp_path / 'run', RUNNING, name='quick')
    with pytest.raises(SystemExit) as end:
        cli.main(['watch', str(tmp_path)])
    out = capsys.readouterr().out
    assert end.value.code == 0 and 'quick' in out and '\x1b' not in out


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['{}/none', '--once'], 'no run in {}/none'),
        (['{}', '--once'], 'a run is a folder with metrics.jsonl, or with config.json and checkpoints'),
        (['{}/file'], '{}/file is a file'),
        ([''], 'DIR is empty'),
        (['{}', '--interval', '0'], '--interval 0 must be at least 0.1'),
        (['{}', '--interval', 'nan'], '--interval nan must be finite'),
        (['{}', '--config.train.steps=3'], 'unknown argument'),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, words):
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit) as end:
        cli.main(['watch', *(argument.format(tmp_path) for argument in arguments)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith('error: ') and len(error.splitlines()) == 1
    assert words.format(tmp_path) in error
    with pytest.raises(UserError):
        watching.watch([str(tmp_path / 'none')], once=True)


def test_runs_are_found_through_links_each_once(tmp_path):
    folder = write(tmp_path / 'elsewhere' / 'run', [STARTED])
    (tmp_path / 'top').mkdir()
    (tmp_path / 'top' / 'run').symlink_to(folder)
    (tmp_path / 'top' / 'again').symlink_to(folder)
    (tmp_path / 'top' / 'up').symlink_to(tmp_path)
    assert [found.resolve() for found in run_folders([tmp_path / 'top', folder])] == [folder]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_on_a_terminal_it_waits_for_a_run_shows_it_and_leaves_the_terminal_clean(tmp_path, number):
    ours, theirs = pty.openpty()
    environment = {**os.environ, 'TERM': 'xterm', 'COLUMNS': '80', 'LINES': '24'}
    process = subprocess.Popen(
        command(tmp_path, '--interval', '0.1'), cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = b''

    def read(until=None):
        """Collects output until it has these words, or ends."""
        nonlocal seen
        start, deadline = len(seen), time.monotonic() + 60
        with contextlib.suppress(OSError):  # how a pseudo-terminal without a process ends
            while time.monotonic() < deadline and (until is None or until not in seen[start:]):
                if select.select([ours], [], [], 1)[0]:
                    block = os.read(ours, 65536)
                    if not block:
                        break
                    seen += block
        assert until is None or until in seen[start:], seen

    try:
        read(b'waiting')
        folder = write(tmp_path / 'run', [STARTED | {'time': time.time()}], name='newcomer')
        read(b'newcomer')
        append(folder, train(37, time.time()))
        read(b'step 37/100')
        shutil.rmtree(folder)
        read(b'waiting')
        process.send_signal(number)
        read()
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(ours)
    assert b'\x1b[?1049h' in seen and b'\x1b[?25l' in seen, 'another screen, without a cursor'
    assert seen.rindex(b'\x1b[?1049l') > seen.rindex(b'\x1b[?1049h') and seen.rindex(b'\x1b[?25h') > seen.rindex(
        b'\x1b[?25l'
    )
    assert b'Traceback' not in seen
