"""What layers say of their operations and exponentials, against what their traced programs hold."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mixcon_jax import config as configs
from mixcon_jax.models.accounting import exponentials_per_token, flops_per_token
from mixcon_jax.models.context import Context
from mixcon_jax.models.decoder import abstract
from tests.jaxprs import operations

LENGTH, DIM, VOCAB = 512, 128, 64

# Pattern -> operations said for each that is traced, and exponentials traced for each that is said, None where a layer
# says that it has none. Hyena leaves out the network that makes its filters, which a batch's rows share. Beside what is
# said each token's own decay and each chunk's whole are traced; RWKV-7's scores make each decay twice, and WKV's joins
# some of their exponentials, which compilers see. Not here: attention and the gain, whose loops run as far as data say,
# experts, of which CPUs run the dense form, and scans, which are no matrix products.
PATTERNS = {
    'mamba2': (0.9954, 1.047),
    'retnet': (0.9970, 1.032),
    'gla': (0.9379, 1.181),
    'rwkv6': (0.9375, 1.181),
    'rwkv7': (1.0376, 2.089),
    'rwkv4+rwkv_channel_mix': (1.0048, 1.501),
    'large_kernel+mlp': (1.0098, 1.501),
    'hyena': (0.8678, None),
    'hyena_modal+series_mlp': (1.0077, None),
}


@pytest.mark.parametrize('pattern', PATTERNS)
def test_layers_say_what_they_compute(pattern):
    model = model_of(pattern)
    graphdef, state = nnx.split(abstract(model))
    run = lambda state, tokens: nnx.merge(graphdef, state)(tokens, Context.whole(1, LENGTH))[0]
    program = jax.make_jaxpr(run)(state, jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)).jaxpr

    head = 2 * DIM * VOCAB  # with the loss, which is not here
    products = sum(times * multiplied(one) for one, times in operations(program) if one.primitive.name == 'dot_general')
    operations_said, exponentials_traced = PATTERNS[pattern]
    said = flops_per_token(model, LENGTH) / 3 - head
    assert said / (products / LENGTH) == pytest.approx(operations_said, abs=5e-4)
    exponentials = sum(
        times * one.outvars[0].aval.size for one, times in operations(program) if one.primitive.name == 'exp'
    )
    said = exponentials_per_token(model, LENGTH)[0] - VOCAB
    if exponentials_traced is None:
        assert not said and exponentials / LENGTH <= 2 * DIM  # of filters, which are made once a step
    else:
        assert exponentials / LENGTH / said == pytest.approx(exponentials_traced, abs=1e-3)


def test_weights_of_elements_are_no_matrices():
    assert flops_per_token(model_of('attention+series_mlp'), 64) == flops_per_token(model_of('attention+mlp'), 64)


def model_of(pattern):
    config = configs.default()
    config.model.update(dim=DIM, vocab_size=VOCAB, pattern=(pattern,), num_blocks=2)
    config.model.mamba2.head_dim = 32
    config.model.hyena.max_len = config.data.seq_len = LENGTH
    return configs.validate(config).model


def multiplied(product) -> int:
    """Two operations for each multiply-add of a matrix product."""
    (contracted, _), _ = product.params['dimension_numbers']
    over = math.prod(product.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * over * product.outvars[0].aval.size
