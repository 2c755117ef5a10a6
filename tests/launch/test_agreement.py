"""Processes that were given different things, or of which one does not see what others see; and that are to stop."""

import os
import signal
import time

import pytest

from mixcon_jax.runs.records import last, read
from tests.launch.launching import children_of, finish, launch, small_config, wait_until
from tests.tiny import outcome, write_experiment

SECOND = "\n\nimport os, sys\nif sys.argv[sys.argv.index('--rank') + 1 if '--rank' in sys.argv else 0] == '1':\n"


def start(folder, config, workdir: str = 'run', more: str = '', **environment: str):
    experiment = write_experiment(folder / 'experiment.py', config)
    experiment.write_text(experiment.read_text() + more)
    arguments = ('--processes', 2, '--config', experiment, '--workdir', folder / workdir)
    return launch('launch.local', *arguments, environment=environment)


@pytest.mark.slow
def test_one_that_was_given_another_experiment_is_named(tmp_path):
    """What is compared has a fast test in tests/test_processes.py."""
    second = '    first, get_config = get_config, lambda: other()\n\n\ndef other():\n    config = first()\n'
    second += '    config.optim.learning_rate = 0.5\n    return config\n'
    output = finish(start(tmp_path, small_config(tmp_path), more=SECOND + second), code=2)
    assert 'error: process 1 has another run to make than process 0; these differ: optim.learning_rate;' in output
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_one_that_does_not_see_the_checkpoints_condemns_none(tmp_path):
    """How each case is judged has a fast test in tests/test_restoring.py."""
    config = small_config(tmp_path, train__steps=4, checkpoint__every=2)
    finish(start(tmp_path, config))
    config.train.steps, config.train.extend = 6, True
    blind = '    import pathlib\n\n    from mixcon_jax.runs import saved\n\n'
    blind += '    saved.Path = lambda path: pathlib.Path("/nowhere")\n'
    output = finish(start(tmp_path, config, more=SECOND + blind), code=2)
    assert 'a checkpoint that other processes have is not there (process 1 of 2)' in output
    assert sorted(os.listdir(tmp_path / 'run' / 'checkpoints')) == ['2', '4']
    assert 'going on after step 4 of 6' in finish(start(tmp_path, config))


@pytest.mark.slow
def test_an_evaluation_of_several_processes_ends_for_a_signal(tmp_path):
    """A single process's is in tests/test_train.py, how several agree in tests/test_stop.py."""
    config = small_config(tmp_path, train__steps=4, eval__every=2, checkpoint__every=4)
    slow = (
        "\n\nimport os, sys, time\nif os.environ.get('SLOW') and '--rank' in sys.argv:\n"
        '    from mixcon_jax import train\n\n    score = train.score\n\n'
        '    def slowly(eval_batch, rows, step):\n'
        '        def each(batch):\n            open(os.environ["SLOW"], "w").close()\n            time.sleep(1)\n'
        '            return eval_batch(batch)\n\n        many = [batch for batch in rows for _ in range(60)]\n'
        '        return score(each, many, step)\n\n    train.score = slowly\n'
    )
    launcher = start(tmp_path, config, more=slow, SLOW=str(tmp_path / 'evaluating'))
    wait_until(launcher, (tmp_path / 'evaluating').exists)
    begin = time.monotonic()
    os.kill(children_of(launcher.pid)[1], signal.SIGTERM)
    finish(launcher, code=75)
    assert time.monotonic() - begin < 40
    assert last(read(tmp_path / 'run' / 'metrics.jsonl'), kind='run')['step'] == 2
    finish(start(tmp_path, config))
    finish(start(tmp_path, config, 'whole'))
    assert outcome(tmp_path / 'run') == outcome(tmp_path / 'whole')
