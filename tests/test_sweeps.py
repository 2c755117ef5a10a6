"""Cases of a sweep are what ``sweep()`` says, and what is wrong with it is said in one line."""

import pytest

from launch.sweep import cases
from mixcon_jax import config as configs
from mixcon_jax.config import ConfigError

HEAD = 'from mixcon_jax.config import default\n\n\ndef get_config(arg=None):\n    return default()\n\n\n'


def experiment(tmp_path, body: str) -> str:
    """An experiment file of the defaults whose sweep() has this body; '' leaves it out."""
    path = tmp_path / 'experiment.py'
    lines = ''.join(f'    {line}\n' for line in body.splitlines())
    path.write_text(HEAD + (f'def sweep(arg=None):\n{lines}' if body else ''))
    return str(path)


def test_cases_hold_their_overrides_and_folders(tmp_path):
    path = experiment(
        tmp_path,
        "for seed in (0, 7):\n"
        "    yield {'name': '4:4 NoPE', 'model.pattern': ('mamba+mlp', 'attention+mlp'), 'seed': seed}\n"
        "yield {'optim.learning_rate': 0.25, 'model.conba.taps': [1, 3], 'optim.betas': (0.5, 0.75)}\n",
    )  # fmt: skip
    first, second, third = cases.cases(path)
    assert (first.name, first.folder) == ('4:4 NoPE', '4-4-NoPE/seed-0')
    assert second.folder == '4-4-NoPE/seed-7' and second.config.seed == 7
    assert first.config.model.pattern == ('mamba+mlp', 'attention+mlp')
    assert third.name == 'learning_rate=0.25 taps=1,3 betas=0.5,0.75'
    assert third.folder == 'learning_rate=0.25-taps=1-3-betas=0.5-0.75/seed-0'
    assert third.config.model.conba.taps == (1, 3) and third.config.optim.betas == (0.5, 0.75)
    # The overrides alone, as the command line takes them, give the same configuration.
    for case in (first, second, third):
        assert configs.validate(configs.load(path, case.overrides)) == case.config
        assert case.config.name == case.name


def test_shared_overrides_hold_unless_the_case_sets_the_key(tmp_path):
    path = experiment(tmp_path, "yield {'seed': 3}\nyield {'train.steps': 40}")
    first, second = cases.cases(path, ['train.steps=70', 'seed=1'])
    assert (first.config.train.steps, first.config.seed, first.folder) == (70, 3, 'run/seed-3')
    assert (second.config.train.steps, second.config.seed, second.folder) == (40, 1, 'steps=40/seed-1')


def test_the_argument_reaches_sweep(tmp_path):
    path = experiment(tmp_path, "yield {'name': arg or 'none'}")
    assert cases.cases(f'{path}:many')[0].name == 'many'
    assert cases.cases(path)[0].name == 'none'


def test_long_names_make_folders_that_can_be_made(tmp_path):
    path = experiment(tmp_path, "yield {'model.pattern': ('conba+mlp',) * 40}")
    (tmp_path / cases.cases(path)[0].folder).mkdir(parents=True)


@pytest.mark.parametrize(
    'body, words',
    [
        ('', ['has no sweep()']),
        ('return []', ['yields no case']),
        ("raise ZeroDivisionError('arms')", ['sweep() failed', 'ZeroDivisionError', 'arms']),
        ('return None', ['sweep() failed', 'NoneType']),
        ("yield {'train.stps': 3}", ['case 0', 'stps=3', 'unknown option train.stps', 'train.steps']),
        ("yield {'seed': 1}\nyield {'train': 3}", ['case 1', 'train', 'group of options']),
        ("yield {'train.steps': 'many'}", ['case 0', 'train.steps']),
        ("yield {'train.steps': 1.5}", ['case 0', 'train.steps']),
        ("yield {'model.attention.num_heads': 5}", ['case 0', 'must divide']),
        ("yield {'model.pattern': ('konba',)}", ['case 0', 'konba']),
        ('yield 3', ['must yield dicts', '3']),
        ('yield {3: 4}', ['must yield dicts', '{3: 4}']),
        ("yield {'name': 'a'}\nyield {'name': 'a'}", ['a/seed-0 twice']),
        ("yield {'name': 'a b', 'seed': 1}\nyield {'name': 'a:b', 'seed': 1}", ['a-b/seed-1 twice']),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, body, words):
    with pytest.raises(ConfigError) as error:
        cases.cases(experiment(tmp_path, body))
    message = str(error.value)
    assert '\n' not in message and 'experiment.py' in message
    assert all(word in message for word in words), message


def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=r'nowhere\.py does not exist'):
        cases.cases(str(tmp_path / 'nowhere.py'))
