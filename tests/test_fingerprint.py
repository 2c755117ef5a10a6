"""The fingerprint tells any difference in names, types, shapes or bits, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mixcon_jax.runs.fingerprint import fingerprint


def test_every_difference_shows():
    base = {'a': {'x': np.arange(6, dtype=np.float32)}, 'b': np.ones((2, 3), np.float32)}
    flipped = np.arange(6, dtype=np.float32)
    flipped.view(np.uint8)[0] ^= 1
    others = [
        {'a': {'y': base['a']['x']}, 'b': base['b']},
        {'a': {'x': flipped}, 'b': base['b']},
        {'a': {'x': base['a']['x'].reshape(2, 3)}, 'b': base['b']},
        {'a': {'x': base['a']['x'].view(np.int32)}, 'b': base['b']},
        {'a': {'x': base['a']['x']}},
    ]
    assert len({fingerprint(tree) for tree in [base, *others]}) == 1 + len(others)


def test_order_layout_and_container_do_not_show():
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    y = jnp.arange(3, dtype=jnp.bfloat16)
    mesh = jax.make_mesh((8,), ('d',))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec('d')))
    want = fingerprint({'x': x, 'y': y})
    assert fingerprint({'y': y, 'x': spread}) == want
    assert fingerprint({'y': np.asarray(y), 'x': np.asfortranarray(x)}) == want
    assert len(want) == 64
