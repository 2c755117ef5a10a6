"""What a report writes, and what it refuses."""

import json
import re
import xml.etree.ElementTree
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from scipy import stats

from mixcon_jax import cli
from mixcon_jax.reports import comparison, curves
from mixcon_jax.reports.report import collect, report
from tests.test_report import START, rows, scores, sweep, write_run

# ----- what is written ----------------------------------------------------------------------------------------------


def check_figures(out: Path, names: set[str]) -> None:
    """Every figure is there as a picture with something in it and as SVG whose text is text; no other one is."""
    assert {path.stem for path in out.glob('*.png')} == {path.stem for path in out.glob('*.svg')} == names
    for name in names:
        pixels = matplotlib.image.imread(out / f'{name}.png')
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.01
        tree = xml.etree.ElementTree.parse(out / f'{name}.svg')
        assert tree.getroot().tag.endswith('svg')
        assert any(element.tag.endswith('text') for element in tree.iter())


def test_the_command_writes_tables_and_figures(tmp_path, capsys):
    top = sweep(tmp_path / 'runs', {'base': [2.0, 2.1, 2.2], 'less $x_1$': [1.5, 1.61, 1.69]})
    before = {path: path.read_bytes() for path in top.rglob('*') if path.is_file()}
    out = tmp_path / 'out' / 'deeper'
    with pytest.raises(SystemExit) as end:
        cli.main(['report', str(top), '--out', str(out), '--baseline', 'base'])
    assert end.value.code == 0
    assert before == {path: path.read_bytes() for path in top.rglob('*') if path.is_file()}, 'runs are only read'
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(out / 'report.md')
    assert re.search(r'less \$x_1\$ .* 3 done +1\.6000 ± 0\.0954 +-0\.5000 +lower', printed)
    check_figures(out, {'loss-tokens', 'loss-flops', 'final', 'differences'})
    assert not list(out.glob('.*')), 'no scratch files'

    page = (out / 'report.md').read_text()
    for target in re.findall(r'\]\(([^)]+)\)', page):
        assert (out / target).is_file(), target
    for words in (
        f"mixcon report {top} --out {out} --baseline base", 'jax 0.', 'mixcon_jax ', '6 runs in 2 arms, 6 done',
        '| base | 3 | 2.1000 ± 0.1000 | 2.0000 to 2.2000 |', '0: 2.0000, 1: 2.1000, 2: 2.2000', '3 of 3 lower',
        'optim.weight_decay alone',
    ):  # fmt: skip
        assert words in page, words

    assert '| arm | parameters | active | added | FLOPs/token |' in page and 'of Conba' not in page
    base, less = rows(out / 'arms.csv')
    assert int(base['parameters_added']) == collect([top]).arms[0].costs.counts.added > 0
    assert (base['verdict'], less['verdict'], less['baseline'], less['pairs']) == ('baseline', 'lower', 'base', '3')
    assert float(less['difference']) == pytest.approx(-0.5)
    expected = stats.ttest_rel([1.5, 1.61, 1.69], [2.0, 2.1, 2.2]).confidence_interval(0.95)
    assert (float(less['difference_low']), float(less['difference_high'])) == pytest.approx(expected, rel=1e-9)
    assert float(base['loss_sd']) == pytest.approx(0.1)
    assert float(base['optim.weight_decay']) == 0.1
    assert int(base['state_bytes_8192']) > int(base['state_bytes'])
    each = rows(out / 'runs.csv')
    assert [(row['arm'], row['seed']) for row in each[:3]] == [('base', '0'), ('base', '1'), ('base', '2')]
    assert [float(row['final_loss']) for row in each] == [2.0, 2.1, 2.2, 1.5, 1.61, 1.69]
    assert each[0]['heldout_tokens'] == '1000' and each[0]['tokens_seen'] == '5120'
    assert float(each[0]['training_flops']) == 5120 * float(base['flops_per_token'])


def test_the_same_runs_give_the_same_figures(tmp_path):
    top = sweep(tmp_path / 'runs', {'a': [2.0, 2.1], 'b': [1.5, 1.7]}, 'data__sources', [('x',), ('y',)])
    report([top], tmp_path / '1')
    matplotlib.rcParams['font.size'] = 30  # somebody's matplotlibrc
    try:
        report([top], tmp_path / '2')
    finally:
        matplotlib.rcdefaults()
    files = [path.name for path in (tmp_path / '1').iterdir() if path.suffix != '.md']
    assert len(files) == 2 + 2 * 3
    for name in files:
        assert (tmp_path / '1' / name).read_bytes() == (tmp_path / '2' / name).read_bytes(), name


def test_figures_that_are_no_longer_true_go_away(tmp_path):
    top = sweep(tmp_path / 'runs', {'a': [2.0], 'b': [1.5]})
    report([top], tmp_path / 'out')
    (tmp_path / 'out' / 'mine.png').write_bytes(b'')
    for path in top.rglob('metrics.jsonl'):
        path.write_text(''.join(line for line in path.open() if '"eval"' in line or '"train"' in line))
    page = report([top], tmp_path / 'out').read_text()
    assert 'No run is done yet' in page
    (tmp_path / 'out' / 'mine.png').unlink()
    check_figures(tmp_path / 'out', {'loss-tokens', 'loss-flops'})


@pytest.mark.parametrize('losses, end', [((2.0,), ''), ((), ''), ((3.0, 2.5, 2.2, 2.0), 'done')])
def test_a_single_run(tmp_path, losses, end, capsys):
    folder = write_run(tmp_path / 'run', losses, end)
    page = report([folder])
    assert page == folder / 'report' / 'report.md'
    text = page.read_text()
    assert text.startswith('# Report: run\n')
    assert 'There is one arm' in text and '## Against' not in text
    drawn = {'loss-tokens', 'loss-flops'} if losses else set()
    check_figures(page.parent, drawn | ({'final'} if end else set()))
    assert '1 run in 1 arm' in text
    report([folder])  # its own output is no run


def test_different_experiments_side_by_side(tmp_path):
    sweep(tmp_path / 'one', {'a': [2.0, 2.1], 'b': [1.9, 2.0]})
    write_run(tmp_path / 'two' / 'run', name='c', data__sources=('files:*.txt',), model__pattern=('mamba+mlp',),
              train__batch_size=2, started=START + 9e5)  # fmt: skip
    page = report([tmp_path / 'one', tmp_path / 'two'], tmp_path / 'out').read_text()
    assert page.startswith('# Report: out\n')
    assert '5 runs in 3 arms' in page and 'different held-out text' in page
    assert '| c | 0 | – |' in page.split('## Against a')[1]


def test_many_comparisons_are_corrected_for(tmp_path):
    table = {f'arm {i}': list(np.random.default_rng(i).normal(2.0, 0.1, 3)) for i in range(5)}
    page = report([sweep(tmp_path / 'runs', table)], tmp_path / 'out').read_text()
    assert 'Of 4 comparisons' in page and 'up to 20 %' in page
    factor = stats.t.ppf(1 - 0.025 / 4, 2) / stats.t.ppf(0.975, 2)
    assert f'with 3 pairs its intervals are {factor:.1f} times as wide' in page


def test_the_same_configuration_under_two_names_is_one_arm(tmp_path):
    write_run(tmp_path / '1', name='one')
    write_run(tmp_path / '2', name='two', seed=1)
    found = collect([tmp_path])
    assert [arm.label for arm in found.arms] == ['one']
    assert any('one, two' in note for note in found.notes)


def test_accuracy_by_length(tmp_path):
    for seed in (0, 1):
        for number, name in enumerate(('a', 'b')):
            table = {str(n): {'accuracy': 1.0 - n / 1000 - 0.1 * seed, 'loss': 0.1, 'tokens': 9} for n in (128, 32, 64)}
            final = {'by_length': table, 'accuracy': 0.9 - 0.1 * seed - 0.2 * number, 'bytes': 0, 'bits_per_byte': None}
            write_run(tmp_path / name / f'seed-{seed}', name=name, seed=seed, started=START + number, final=final,
                      data__sources=('synthetic:induction',), optim__eps=(1e-8, 1e-6)[number])  # fmt: skip
    folder = write_run(
        tmp_path / 'c', (3.0,), end='', name='c', data__sources=('synthetic:induction',), optim__eps=1e-5
    )
    with (folder / 'metrics.jsonl').open('a') as file:
        table = {'64': {'accuracy': 0.25, 'loss': 1.0, 'tokens': 9}}
        file.write(json.dumps({'kind': 'eval', 'step': 20, **scores(3.0), 'by_length': table}) + '\n')
    found = collect([tmp_path])
    accuracies, final = curves.accuracies(found.arms[0])
    assert final and list(accuracies) == [32, 64, 128]
    np.testing.assert_allclose(list(accuracies.values()), [[0.968, 0.868], [0.936, 0.836], [0.872, 0.772]])
    assert found.score is comparison.ACCURACY and found.differences['b'].mean == pytest.approx(-0.2)
    page = report([tmp_path], tmp_path / 'out').read_text()
    assert '| a | 0.918 (0.868 to 0.968) | 0.886 (0.836 to 0.936) | 0.822 (0.772 to 0.872) |' in page
    assert '| c (unfinished) | – | 0.250 | – |' in page
    assert 'positive is better' in page and 'bits per byte |' not in page.split('## Final')[1].split('##')[0]
    check_figures(tmp_path / 'out', {'loss-tokens', 'loss-flops', 'final', 'differences', 'accuracy-by-length'})
    each = {(row['arm'], row['seed']): row for row in rows(tmp_path / 'out' / 'runs.csv')}
    assert [each[arm, '0']['final_accuracy_32'] for arm in 'abc'] == ['0.968', '0.968', '']
    arms = {row['arm']: row for row in rows(tmp_path / 'out' / 'arms.csv')}
    means = [float(arms['a'][f'accuracy_{length}_mean']) for length in (32, 64, 128)]
    assert means == pytest.approx([0.918, 0.886, 0.822])
    assert [float(arms['a'][f'accuracy_64_{end}']) for end in ('min', 'max')] == pytest.approx([0.836, 0.936])
    assert arms['c']['accuracy_64_mean'] == '', 'the evaluation of a run that goes on'


@pytest.mark.parametrize('table', [{'64': 3}, {'x': {'accuracy': 1.0}}, [], {'64': {'accuracy': None}}])
def test_other_things_called_by_length_are_passed_over(tmp_path, table):
    write_run(tmp_path / 'run', final={'by_length': table})
    assert curves.accuracies(collect([tmp_path]).arms[0]) == ({}, False)


# ----- refusals -----------------------------------------------------------------------------------------------------


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(['report', *map(str, argv)])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bad_input_is_one_line(tmp_path, capsys):
    top = sweep(tmp_path / 'runs', {'2:6': [2.0], '0:8': [1.5]})
    assert "did you mean '2:6'? the arms are '2:6', '0:8'" in refused(capsys, top, '--baseline', '2-6')
    assert '/nowhere' in refused(capsys, '/nowhere')
    (tmp_path / 'file').write_text('mine')
    assert f'cannot write {tmp_path / "file"}' in refused(capsys, top, '--out', tmp_path / 'file')
    assert (tmp_path / 'file').read_text() == 'mine'
    (tmp_path / 'out' / 'runs.csv').mkdir(parents=True)
    assert f'cannot write {tmp_path / "out" / "runs.csv"}' in refused(capsys, top, '--out', tmp_path / 'out')
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['runs.csv'], 'no scratch file stays'
    assert '--out is empty' in refused(capsys, top, '--out', '') and 'FOLDER is empty' in refused(capsys, '')
    (tmp_path / 'paper').mkdir()
    (tmp_path / 'paper' / 'final.png').write_text('mine')
    assert 'holds final.png, but no report' in refused(capsys, top, '--out', tmp_path / 'paper')
    assert (tmp_path / 'paper' / 'final.png').read_text() == 'mine'
    assert 'unknown argument --config.seed=1' in refused(capsys, top, '--config.seed=1')
