"""The cases of a sweep: values reach them as they are, and another file by now is noticed; their estimates."""

import pytest

from launch.sweep.cases import cases, require_unchanged
from launch.sweep.estimate import makespan
from mixcon_jax import config as configs
from mixcon_jax.config import ConfigError
from tests.launch.launching import small_config, write_sweep

ONE = "def sweep():\n    yield {'name': 'one'}\n"


def test_texts_with_what_would_separate_them_reach_the_cases(tmp_path):
    sources = 'files:a b/*.txt', 'files:c,d:e/*.txt', 'stdlib'
    rules, taps = ('embed=fsdp', 'mlp=tensor'), 'tuple(np.arange(1, 4, 2))'
    values = f"'name': 'x', 'data.sources': {sources}, 'mesh.rules': {rules}, 'model.conba.taps': {taps}"
    sweep = f'import numpy as np\n\ndef sweep():\n    yield {{{values}}}\n'
    write_sweep(tmp_path / 'experiment.py', small_config(tmp_path), sweep)
    [case] = cases(str(tmp_path / 'experiment.py'))
    assert case.config.data.sources == sources and case.config.mesh.rules == rules
    again = configs.load(case.path, case.overrides)
    assert again.data.sources == sources and again.model.conba.taps == (1, 3)


def test_a_case_of_which_the_file_makes_another_by_now_is_refused(tmp_path):
    file = tmp_path / 'experiment.py'
    write_sweep(file, small_config(tmp_path), ONE)
    [case] = cases(str(file))
    require_unchanged(case)
    write_sweep(file, small_config(tmp_path, seed=333), ONE)
    with pytest.raises(
        ConfigError, match=r'has changed since this sweep began \(seed 0 -> 333\); begin the sweep again'
    ):
        require_unchanged(case)
    drawn = '    import random\n    config.log.every = random.randrange(10**9)\n    return config'
    file.write_text(
        file.read_text().replace('    return from_json', '    config = from_json').replace(')\n', f')\n{drawn}\n', 1)
    )
    require_unchanged(case)  # another each time it is read
    file.unlink()
    with pytest.raises(ConfigError, match='does not exist'):
        require_unchanged(case)


def test_jobs_are_begun_in_order():
    assert makespan([4, 3, 2, 1], 1) == 10
    assert makespan([4, 3, 2, 1], 2) == 5  # 4 and 1 beside 3 and 2
    assert makespan([1, 1, 4], 2) == 5
    assert makespan([], 3) == 0
