"""Scores and samples of a checkpoint by two processes are those of one, and only the first of them prints."""

import os
import re
import signal
import subprocess
import time

import pytest

from launch import local
from mixcon_jax import cli
from mixcon_jax.evaluate import evaluate
from mixcon_jax.train import train
from tests.launch.launching import all_end, children_of, finish, launch, wait_until
from tests.launch.test_failures import free_port
from tests.test_inference_on_meshes import SMALL
from tests.tiny import tiny_config

MESH = ('--config.mesh.data=1', '--config.mesh.fsdp=2', '--config.mesh.tensor=2')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp('run')
    train(tiny_config(folder, **SMALL, model__pattern=('mamba', 'attention+mlp')), folder / 'run')
    return folder / 'run'


def by_two(command: str, run, *arguments: object, code: int = 0) -> str:
    """What two processes of two devices each print; where they are to fail, their errors too."""
    given = (command, '--processes', 2, '--devices-per-process', 2, '--workdir', run, *arguments)
    return finish(launch('launch.local', *given, stderr=subprocess.STDOUT if code else subprocess.DEVNULL), code=code)


def described(capsys, *arguments: object) -> str:
    """What one process of one device prints."""
    with pytest.raises(SystemExit):
        cli.main(list(map(str, arguments)))
    return capsys.readouterr().out


def numbers(text: str) -> list[float]:
    return [float(number.replace(',', '')) for number in re.findall(r'\d[\d,]*(?:\.\d+)?', text)]


@pytest.mark.slow
def test_two_processes_score_as_one(run, capsys):
    """Held-out text, its rows shared out over processes."""
    output, wanted = by_two('eval', run), described(capsys, 'eval', '--workdir', run)
    assert output.count('bits per byte') == 1 and output.count('\n') == 1, output
    assert numbers(output) == pytest.approx(numbers(wanted), rel=1e-3) and numbers(wanted)[-2] > 100


@pytest.mark.slow
def test_two_processes_score_a_file_with_parameters_between_them(run, tmp_path, capsys):
    text = tmp_path / 'text.txt'
    text.write_text('the state of a loop ' * 90)
    output = by_two('eval', run, text, '--batch-size', 6, *MESH)
    assert numbers(output) == pytest.approx(numbers(described(capsys, 'eval', '--workdir', run, text)), rel=1e-3)
    assert evaluate(run, [str(text)]).bytes == numbers(output)[-2]


@pytest.mark.slow
@pytest.mark.parametrize('prompts', [('the state',), ('the state', 'of a', '')])
def test_two_processes_sample_as_one(run, capsys, prompts):
    """One prompt, which the mesh's rows do not divide, streamed; and three."""
    asked = [word for prompt in prompts for word in ('--prompt', prompt)]
    asked += ['--max-new-tokens', 12, '--temperature', 1.0, '--seed', 3]
    wanted = described(capsys, 'generate', '--workdir', run, *asked)
    assert by_two('generate', run, *asked, *MESH) == wanted.replace('\r', '\n')  # as a pipe of text reads it


@pytest.mark.slow
def test_two_that_are_told_where_the_first_is_score_as_one(run, capsys):
    """As under a scheduler: only the first prints what came out."""
    where = ('--coordinator', f'127.0.0.1:{free_port()}', '--processes', 2, '--config.mesh.cpu_devices=2', *MESH)
    given = ('launch.cluster', 'eval', '--workdir', run, *where)
    first, second = [finish(each) for each in [launch(*given, '--rank', rank) for rank in range(2)]]
    wanted = numbers(described(capsys, 'eval', '--workdir', run))
    assert numbers(first[first.index('step 2') :]) == pytest.approx(wanted, rel=1e-3)
    assert 'bits per byte' not in second


@pytest.mark.slow
@pytest.mark.parametrize('who', ['the launcher', 'the launcher, killed', 'a process'])
def test_a_signal_ends_an_evaluation(run, tmp_path, who):
    (tmp_path / 'long.txt').write_text('one two three four five six seven ' * 200_000)
    launcher = launch('launch.local', 'eval', '--processes', 2, '--workdir', run, '--', tmp_path / 'long.txt')
    wait_until(launcher, lambda: len(children_of(launcher.pid)) == 2)
    time.sleep(12)  # they have met, and are about it
    children = children_of(launcher.pid)
    assert launcher.poll() is None and len(children) == 2
    if who == 'a process':
        os.kill(children[1], signal.SIGTERM)
        assert 'killed by SIGTERM' in finish(launcher, code=1, seconds=40)
    elif who == 'the launcher':
        launcher.send_signal(signal.SIGINT)
        finish(launcher, code=130, seconds=20)
    else:
        launcher.kill()
        launcher.wait()
    assert all_end(children, 20)


@pytest.mark.slow
def test_what_all_refuse_is_said_once(run):
    """A batch that four devices do not divide."""
    output = by_two('eval', run, '--batch-size', 6, code=2)
    assert output.count('error') == 1 and 'must divide --batch-size=6' in output


@pytest.mark.parametrize(
    'given, message',
    [
        (['merge'], 'merge is no command of python -m launch.local, which runs train, eval, generate'),
        (['eval', '--config.model.dim=8'], 'override model.dim: a checkpoint has its own options'),
        (['generate', '--patience', '0'], '--patience 0 must be at least 1'),
    ],
)
def test_what_several_processes_do_not_do_is_refused_in_one_line(tmp_path, capsys, given, message):
    with pytest.raises(SystemExit) as end:
        local.main([*given, '--processes', '2', '--workdir', str(tmp_path)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count('\n') == 1, error
