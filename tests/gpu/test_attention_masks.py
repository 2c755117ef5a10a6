"""Blockwise attention in a scan over layers, compiled for an H100 that is not there: no mask of more than a tile."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.attention import attention
from kernels_pallas.call import KEPT
from mixcon_jax.planning import hlo
from mixcon_jax.planning.compiling import compile_for, devices

BATCH, LENGTH, TILE, HEADS, KV_HEADS, WIDTH, LAYERS = 2, 2048, 256, 4, 2, 32, 3


@pytest.mark.parametrize(
    'keeping', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['all again', 'all but attention again']
)
def test_no_mask_is_larger_than_a_tile(keeping):
    """Packed documents, forward and backward; what hangs on no query could be computed for all at once."""
    policy = jax.checkpoint_policies.save_only_these_names(KEPT) if keeping else None

    def loss(weights, x, segments):
        @functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
        def layer(x, weight):
            q = (x @ weight).reshape(BATCH, LENGTH, HEADS, WIDTH)
            k = q[:, :, :KV_HEADS]
            y = attention(q, k, k, segment_ids=segments, block_size=TILE, implementation='blockwise')
            return x + y.reshape(x.shape), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32))

    dim = HEADS * WIDTH
    shapes = (LAYERS, dim, dim), (BATCH, LENGTH, dim)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    segments = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    text = compile_for(devices('h100')[0], jax.grad(loss, argnums=(0, 1)), *arrays, segments).as_text()
    tile = BATCH * HEADS * TILE * TILE
    masks = [math.prod(hlo.sizes(dims)) for dims in re.findall(r'pred\[([\d,]+)\]', text)]
    assert max(masks) == tile
    assert hlo.largest(text) <= max(tile, LAYERS * BATCH * LENGTH * dim)  # the layers' inputs are kept
