"""Whole train steps compiled for an H100 that is not there: what they launch, wait for and hold, at most."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mixcon_jax.models.context import Context
from mixcon_jax.models.decoder import abstract
from mixcon_jax.planning.compiling import devices
from tests.benchmarks.compiled_step import GIB, in_a_process, main
from tests.models.cases import model_config

# Ceilings a few per cent above what was counted: peak in GiB, kernels, conditions waited for, GiB moved. With tokamax's
# kernels, where it is installed (the extra "gpu"), and without.
SELECTIVE = 'model.remat=selective'
LIBRARY = {
    ('dense 75M', ()): (7.9, 560, 0, 70),
    ('dense 856M', ()): (26, 850, 0, 167),
    ('dense 856M', (SELECTIVE,)): (24.5, 1_300, 0, 183),
    ('2:6 Conba', ()): (14.9, 1_340, 0, 126),
    ('2:6 Conba, 8 experts', ()): (16.6, 1_490, 0, 131),
    ('2:6 Conba, 8 experts', (SELECTIVE,)): (11.6, 1_730, 0, 144),
}
PORTABLE = {
    ('dense 75M', ()): (9.4, 1_700, 0, 300),
    ('dense 856M', ()): (27.5, 7_900, 0, 730),
    ('dense 856M', (SELECTIVE,)): (26.5, 8_200, 0, 750),
}
CEILINGS = PORTABLE if importlib.util.find_spec('tokamax') is None else LIBRARY


@pytest.mark.slow  # test_default_kernels.py always lowers a step for a GPU, with the dispatch of this one
def test_a_small_step_and_its_table():
    found = in_a_process('dense 75M', (), 'h100', tiny=True)
    assert 'error' not in found, found
    assert 50 < found['kernels'] < 400 and found['conditions'] == 0, found
    assert 0 < found['float32'] < found['bytes'] and 0 < found['necessary'] < found['bytes']
    assert 0.9 < found['flops'] / found['flops_of_model'] < 1.5


def test_a_rung_that_is_none_is_named(capsys):
    with pytest.raises(SystemExit):
        main(['no such rung'])
    assert 'no rung' in capsys.readouterr().err


# Conba has Mamba's kernels, and the gain's.
@pytest.mark.parametrize('mixer', ['mamba', pytest.param('conba', marks=pytest.mark.slow)])
def test_selective_rematerialisation_runs_no_gpu_kernel_again(mixer):
    def program(remat):
        options = {'pattern': (f'{mixer}+mlp',), 'remat': remat, 'dim': 128, 'conba.head_dim': 32, 'ssm.d_state': 16}
        config = model_config(options | {'ssm.chunk': 0, 'conba.gain_chunk': 32}, 'bfloat16')
        graphdef, params = nnx.split(abstract(config), nnx.Param)

        def loss(params, ids):
            hidden = nnx.merge(graphdef, params)(ids, Context.whole(*ids.shape))[0]
            return jnp.sum(hidden.astype(jnp.float32))

        ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)
        with jax.default_device(devices('h100')[0]):
            lowered = jax.jit(jax.grad(loss)).trace(params, ids).lower(lowering_platforms=('cuda',))
        text = lowered.as_text()
        return len(re.findall('custom_call @mosaic_gpu', text)), text.count('stablehlo.dot_general')

    kernels, products = program('none')
    assert kernels > 2
    assert program('selective') == (kernels, products)
    assert program('block') > (kernels, products)


@pytest.mark.slow
@pytest.mark.parametrize('rung, options', CEILINGS, ids=str)
def test_ceilings(rung, options):
    found = in_a_process(rung, options, 'h100')
    assert 'error' not in found, found
    counted = found['peak'] / GIB, found['kernels'], found['conditions'], found['bytes'] / GIB
    assert all(value <= most for value, most in zip(counted, CEILINGS[rung, options])), counted
    assert found['flops'] < 1.15 * found['flops_of_model']


@pytest.mark.slow
@pytest.mark.parametrize('mesh, kernels, sent', [('mesh.data=8', 680, 0.51), ('mesh.fsdp=8', 630, 0.45)])
def test_ceilings_of_one_of_eight_gpus(mesh, kernels, sent):
    """The dense 75M model: launches, and the GiB that a GPU sends the others."""
    pytest.importorskip('tokamax', reason='tokamax, of the extra "gpu", is not installed')
    found = in_a_process('dense 75M', (mesh,), 'h100', gpus=8)
    assert 'error' not in found, found
    assert found['kernels'] <= kernels and found['sent'] / GIB <= sent and found['conditions'] == 0, found


@pytest.mark.slow
def test_the_dense_75m_step_launches_at_most_60_kernels_a_layer_and_60():
    """With products by cuBLAS; Triton's splits of a sum, which only a GPU could choose by timing, add a kernel each."""
    pytest.importorskip('tokamax', reason='tokamax, of the extra "gpu", is not installed')
    found = in_a_process('dense 75M', (), 'h100', products='cublas')
    assert found['kernels'] <= 60 * 8 + 60, found
