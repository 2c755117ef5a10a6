"""What layers say of their operations and exponentials, against what their traced programs hold."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mixcon_jax import config as configs
from mixcon_jax.models.accounting import exponentials_per_token, flops_per_token
from mixcon_jax.models.context import Context
from mixcon_jax.models.decoder import create
from tests.jaxprs import operations

LENGTH, DIM, VOCAB = 512, 128, 64

# Pattern -> the exponentials traced for each that is said, where a layer says some that are its own: what is beside
# them (a token's own decay, a chunk's whole) is traced, too, and RWKV-7's scores make each decay twice, which compilers
# see. Not here: attention and the gain, whose loops run as far as data say, experts, of which CPUs run the dense form,
# and scans, which no matrix products are.
PATTERNS = {
    'mamba2': (1.0, 1.1),
    'retnet': (1.0, 1.1),
    'gla': (1.0, 1.2),
    'rwkv6': (1.0, 1.2),
    'rwkv7': (2.0, 2.2),
    'rwkv4+rwkv_channel_mix': (1.0, 1.6),
    'large_kernel+mlp': (1.0, 1.6),
    'hyena': None,
    'hyena_modal+series_mlp': None,
}


@pytest.mark.parametrize('pattern', PATTERNS)
def test_layers_say_what_they_compute(pattern):
    config = configs.default()
    config.model.update(dim=DIM, vocab_size=VOCAB, pattern=(pattern,), num_blocks=2)
    config.model.mamba2.head_dim = 32
    config.model.hyena.max_len = config.data.seq_len = LENGTH
    model = configs.validate(config).model
    graphdef, state = nnx.split(nnx.eval_shape(lambda: create(model, 0)))
    run = lambda state, tokens: nnx.merge(graphdef, state)(tokens, Context.whole(1, LENGTH))[0]
    program = jax.make_jaxpr(run)(state, jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)).jaxpr

    head = 2 * DIM * VOCAB  # with the loss, which is not here
    products = sum(times * multiplied(one) for one, times in operations(program) if one.primitive.name == 'dot_general')
    assert 0.85 < (flops_per_token(model, LENGTH) / 3 - head) / (products / LENGTH) < 1.1
    exponentials = sum(
        times * one.outvars[0].aval.size for one, times in operations(program) if one.primitive.name == 'exp'
    )
    said = exponentials_per_token(model, LENGTH)[0] - VOCAB
    if PATTERNS[pattern] is None:
        assert not said and exponentials / LENGTH <= 2 * DIM  # of filters, which are made once a step
    else:
        least, most = PATTERNS[pattern]
        assert least <= exponentials / LENGTH / said < most


def multiplied(product) -> int:
    """Two operations for each multiply-add of a matrix product."""
    (contracted, _), _ = product.params['dimension_numbers']
    over = math.prod(product.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * over * product.outvars[0].aval.size
