"""The command as a person uses it: train, evaluate, sample; and what it says to bad input, in one line each."""

import gzip
import json
import logging
import os
import shutil

import pytest

from mixcon_jax import cli
from tests.tiny import tiny_config, write_experiment


def run(capsys, *argv):
    """Runs the command in this process; returns exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def refused(capsys, *argv):
    """Runs the command, which must fail with exactly one line and no traceback; returns that line."""
    code, _, err = run(capsys, *argv)
    lines = [line for line in err.splitlines() if line.startswith('error: ')]
    assert code == 2, err
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0]
    assert 'Traceback' not in err
    return lines[0]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A finished tiny run: its folder, experiment file and workdir."""
    folder = tmp_path_factory.mktemp('cli')
    config = tiny_config(folder, train__steps=4, model__pattern=('attention+moe',))
    experiment = write_experiment(folder / 'experiment.py', config)
    with pytest.raises(SystemExit) as end:
        cli.main(['train', '--config', str(experiment), '--workdir', str(folder / 'run')])
    assert end.value.code == 0
    return folder


def test_training_again_says_that_it_is_done(trained, capsys):
    before = (trained / 'run' / 'metrics.jsonl').read_bytes()
    code, out, _ = run(capsys, 'train', '--config', trained / 'experiment.py', '--workdir', trained / 'run')
    assert code == 0
    assert 'done after 4 steps' in out and 'gzip -9' in out
    assert (trained / 'run' / 'metrics.jsonl').read_bytes() == before


def test_evaluation_equals_the_runs_own_final_scores(trained, capsys):
    code, out, _ = run(capsys, 'eval', '--workdir', trained / 'run', '--batch-size', '3')
    records = [json.loads(line) for line in (trained / 'run' / 'metrics.jsonl').read_text().splitlines()]
    final = next(record for record in records if record['kind'] == 'final')
    assert code == 0
    assert f'loss {final["loss"]:.3f}' in out
    assert f'{final["tokens"]:,} tokens of {final["bytes"]:,} bytes' in out


def test_evaluation_of_given_files(trained, capsys, tmp_path):
    (tmp_path / 'a.txt').write_text('the state of the loop')
    with gzip.open(tmp_path / 'b.jsonl.gz', 'wt') as file:
        file.write('{"text": "noise and gains"}\n')
    code, out, _ = run(
        capsys, 'eval', '--workdir', trained / 'run', '--step', 'best', tmp_path / 'a.txt', tmp_path / '*.gz'
    )
    assert code == 0
    assert 'of 36 bytes, in rows of 32' in out, out
    code, longer, _ = run(capsys, 'eval', '--workdir', trained / 'run', tmp_path / 'a.txt', '--lengths', '8')
    assert code == 0 and 'in rows of 8' in longer


def test_generation_streams_and_repeats_with_its_seed(trained, capsys):
    def sample(*options):
        code, out, _ = run(capsys, 'generate', '--workdir', trained / 'run', '--max-new-tokens', 8, *options)
        assert code == 0
        return out

    first = sample('--prompt', 'the state')
    assert first.startswith('the state') and first.endswith('\n')
    assert first == sample('--prompt', 'the state')
    several = sample('--prompt', 'the state', '--prompt', 'a', '--num-samples', 2)
    assert several.count('--- ') == 4
    assert first.strip() in several


def test_config_prints_json_and_options(trained, capsys):
    code, out, _ = run(capsys, 'config', '--config', trained / 'experiment.py', '--config.train.steps', '7')
    assert code == 0
    assert json.loads(out)['train']['steps'] == 7
    code, out, _ = run(capsys, 'config', '--config', trained / 'experiment.py', '--help-options')
    assert 'optim.learning_rate = 0.004\n    Peak learning rate.' in out


def test_data_prepare_prints_the_splits_and_baselines(trained, capsys):
    code, out, _ = run(capsys, 'data', 'prepare', '--config', trained / 'experiment.py')
    assert code == 0
    assert 'heldout' in out and 'gzip -9' in out and 'of the text come back 100 %, 100 %' in out


@pytest.mark.parametrize(
    'argument, message',
    [
        ('--config.modle.dim=3', 'did you mean model.dim'),
        ('--config.train.steps=many', 'train.steps'),
        ('--config.train.steps', 'has no value'),
        ('--config.model.pattern=conba+mlp,konba', "did you mean 'conba'"),
        ('--config.train.batch_size=7', 'must divide'),
        ('--config.model.attention.num_heads=5', 'must divide'),
        ('--config.model.moe.top_k=3', 'exceeds model.moe.num_experts'),
        ('--config.data.sources=files:/nowhere/*.txt', '/nowhere/*.txt'),
        ('--config.data.sources=stdlob', 'stdlib'),
        ('--config.model.vocab_size=100', 'model.vocab_size'),
        ('--config.data.tokenizer=/nowhere.json', '/nowhere.json'),
        ('--stps=3', 'unknown argument --stps=3'),
    ],
)
def test_training_refuses_bad_input_and_writes_nothing(trained, capsys, tmp_path, argument, message):
    experiment = trained / 'experiment.py'
    line = refused(capsys, 'train', '--config', experiment, '--workdir', tmp_path / 'run', argument)
    assert message in line
    assert not (tmp_path / 'run').exists(), 'nothing half-written'


def test_weights_that_do_not_exist_are_refused_and_can_be_corrected(trained, capsys, tmp_path):
    options = ['train', '--config', trained / 'experiment.py', '--workdir', tmp_path / 'run']
    assert '/nowhere' in refused(capsys, *options, '--config.train.init_from=/nowhere')
    code, out, _ = run(capsys, *options, f'--config.train.init_from={trained / "run"}')
    assert code == 0
    assert f'weights of {trained / "run"}, step 4' in out


def corpus(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return f'--config.data.sources=files:{path}'


@pytest.mark.parametrize(
    'name, content, message',
    [
        ('empty.txt', b'', 'empty'),
        ('binary.txt', b'text\0\x01\x02', 'binary.txt'),
        ('latin.txt', b'caf\xe9 au lait, s\xb0\xff', 'latin.txt'),
        ('torn.jsonl', b'{"text": "whole"}\n{"text": "tor', 'torn.jsonl:2'),
        ('field.jsonl', b'{"body": "other"}\n', 'body'),
    ],
)
def test_bad_text_is_named(trained, capsys, tmp_path, name, content, message):
    argument = corpus(tmp_path, name, content)
    line = refused(capsys, 'train', '--config', trained / 'experiment.py', '--workdir', tmp_path / 'run', argument)
    assert message in line
    assert not (tmp_path / 'run' / 'config.json').exists()


def test_a_workdir_of_another_config_is_refused_with_the_difference(trained, capsys):
    before = sorted(os.listdir(trained / 'run'))
    options = ['--config', trained / 'experiment.py', '--workdir', trained / 'run', '--config.optim.learning_rate=0.5']
    line = refused(capsys, 'train', *options)
    assert 'optim.learning_rate' in line and '0.5' in line
    assert sorted(os.listdir(trained / 'run')) == before


def test_a_tokenizer_that_is_not_the_stores_is_refused(trained, capsys, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(trained / 'run', workdir)
    store = next((trained / 'cache').glob('*/tokenizer.json'))
    other = json.loads(store.read_text())
    other['added_tokens'][0]['content'] = '</s>'
    vocab = other['model']['vocab']
    vocab['</s>'] = vocab.pop('<|endoftext|>')
    path = tmp_path / 'other.json'
    path.write_text(json.dumps(other))
    source = f'--config.data.sources=store:{store.parent}'
    line = refused(
        capsys, 'train', '--config', trained / 'experiment.py', '--workdir', tmp_path / 'new', source,
        f'--config.data.tokenizer={path}',
    )  # fmt: skip
    assert 'tokenizer' in line


@pytest.mark.parametrize(
    'argv, message',
    [
        (['eval', '--workdir', '/nowhere'], '/nowhere'),
        (['generate', '--workdir', '/nowhere'], '/nowhere'),
        (['eval', '--workdir', 'RUN', '--step', '999'], '999'),
        (['eval', '--workdir', 'RUN', '--step', 'newest'], "'newest'"),
        (['eval', '--workdir', 'RUN', 'missing.txt'], 'missing.txt'),
        (['eval', '--workdir', 'RUN', '--batch-size', '-1'], 'batch-size'),
        (['eval', '--workdir', 'RUN', '--lengths', '64', '32'], 'text is cut into rows of one length'),
        (['generate', '--workdir', 'RUN', '--temperature', '-1'], 'temperature'),
        (['generate', '--workdir', 'RUN', '--max-new-tokens', '0'], 'max-new-tokens'),
        (['generate', '--workdir', 'RUN', '--temperature', '1e-50'], '--temperature 1e-50 is 0 in float32'),
        (['generate', '--workdir', 'RUN', '--top-p', '1e-46'], '--top-p 1e-46 is 0 in float32'),
        (['generate', '--workdir', 'RUN', '--temperature', 'inf'], '--temperature inf must be finite'),
        (['generate', '--workdir', 'RUN', '--top-k', '4294967297'], '--top-k 4294967297 is more than 32 bits hold'),
        (['generate', '--workdir', 'RUN', '--prompt', 'caf\udce9'], r"the prompt b'caf\xe9' is not UTF-8"),
        (['eval', '--workdir', 'caf\udce9'], r"the name of the folder b'caf\xe9' is not UTF-8"),
        (['eval', '--workdir', 'RUN', '--batch-size', '4294967297'], '--batch-size 4294967297 is more than'),
        (['eval', '--workdir', 'RUN', '--lengths', '4294967297'], '--lengths 4294967297 is more than'),
        (['eval', '--workdir', 'RUN', '--step', '9' * 5000], 'must be a number'),
        (['eval', '--workdir', 'RUN', '--config.mesh.cpu_devices', '-1'], 'mesh.cpu_devices'),
        (['eval', '--workdir', 'RUN', '--config.mesh.cpu_devices'], 'write --config.mesh.cpu_devices=VALUE'),
        (['eval', '--workdir', 'RUN', '--', '--config.mesh.data', '1'], "no file matches '--config.mesh.data'"),
        (['eval', '--workdir', 'RUN', '--config.mesh.rules', 'a b', 'no.txt'], "no file matches 'no.txt'"),
        (['eval', '--workdir', 'RUN', '--lengths', '1'], '--lengths 1 must be at least 2'),
        (['watch', 'RUN', '--interval', '1e30'], 'must be at most 86400 seconds'),
        (['train', '--config', 'missing.py', '--workdir', 'x'], 'missing.py'),
    ],
    ids=lambda value: ' '.join(value)[:80] if isinstance(value, list) else '',
)
def test_other_commands_refuse_bad_input(trained, capsys, argv, message):
    argv = [str(trained / 'run') if argument == 'RUN' else argument for argument in argv]
    assert message in refused(capsys, *argv)


def test_a_deleted_checkpoint_file_is_noticed(trained, capsys, tmp_path):
    """Of the only checkpoint: refused. tests/test_checkpoints.py has every kind of damage."""
    workdir = tmp_path / 'run'
    shutil.copytree(trained / 'run', workdir)
    for step in (workdir / 'checkpoints').glob('[0-9]*'):
        for path in step.rglob('d/*'):  # the arrays
            path.unlink()
    assert 'checkpoint' in refused(capsys, 'eval', '--workdir', workdir)


@pytest.mark.parametrize('driver', [True, False])
def test_jax_says_in_one_line_why_it_has_no_gpu_where_a_driver_is(capsys, monkeypatch, tmp_path, driver):
    monkeypatch.setattr('mixcon_jax.host.log_filters.DRIVERS', (str(tmp_path if driver else tmp_path / 'none'),))
    log, errors = logging.getLogger('jax._src.xla_bridge'), logging.StreamHandler()  # after capsys: to its stderr
    log.addHandler(errors)
    try:
        refused(capsys, 'eval', '--workdir', 'nowhere')
        try:
            raise RuntimeError('no cuDNN\nof version 9')
        except RuntimeError:
            log.exception('plugin %s failed', 'cuda')
    finally:
        log.removeHandler(errors)
    lines = capsys.readouterr().err.splitlines()
    assert ('plugin cuda failed: RuntimeError: no cuDNN of version 9' in lines) is driver
    assert not any('Traceback' in line for line in lines)
