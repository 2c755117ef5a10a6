"""Mesh axes that go across processes: a run is that of one process with as many devices, and goes on on other ones."""

import numpy as np
import pytest

from mixcon_jax.runs.weights import load_params
from mixcon_jax.train import train
from mixcon_jax.trees import named_leaves
from tests.launch.launching import finish, launch, small_config
from tests.tiny import outcome, write_experiment

HYBRID = {'model__pattern': ('conba+moe', 'attention+mlp'), 'model__attention__num_kv_heads': 2}


def start(folder, config, workdir: str, processes: int, each: int, *options):
    """Starts the launcher with so many processes of so many devices each."""
    experiment = write_experiment(folder / f'{workdir}.py', config)
    arguments = ('--processes', processes, '--devices-per-process', each, '--config', experiment)
    return launch('launch.local', *arguments, '--workdir', folder / workdir, *options)


def assert_same_run(ours, theirs) -> None:
    """Losses and final parameters are the same up to rounding."""
    losses = [[record['loss'] for record in outcome(run)[:-1]] for run in (ours, theirs)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    params = [named_leaves(load_params(run)[0]['params']) for run in (ours, theirs)]
    assert params[0].keys() == params[1].keys()
    for name, wanted in params[1].items():
        np.testing.assert_allclose(params[0][name], wanted, rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    'mesh, options',
    [
        ({'tensor': 8}, {'model__dim': 64, 'model__attention__num_heads': 8}),
        pytest.param({'context': 8}, {}, marks=pytest.mark.slow),
        pytest.param({'context': 4, 'tensor': 2}, HYBRID, marks=pytest.mark.slow),
        pytest.param({'expert': 8}, HYBRID | {'model__moe__num_experts': 8}, marks=pytest.mark.slow),
        pytest.param({'fsdp': 8}, HYBRID, marks=pytest.mark.slow),
    ],
)
def test_two_processes_of_four_devices_are_one_of_eight(tmp_path, mesh, options):
    axes = {'mesh__data': 1} | {f'mesh__{axis}': size for axis, size in mesh.items()}
    if mesh.get('tensor', 1) > 1:
        options = options | {'model__attention__num_kv_heads': mesh['tensor']}
    config = small_config(tmp_path, train__steps=3, log__every=1, **options, **axes)
    output = finish(start(tmp_path, config, 'pair', 2, 4))
    assert f'between 2 processes: {next(iter(mesh))}' in output
    assert train(config, tmp_path / 'one').exit_code == 0
    assert_same_run(tmp_path / 'pair', tmp_path / 'one')
