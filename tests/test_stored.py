"""A checkpoint's arrays on disk are looked at part by part, and no whole array is gathered to be summed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mixcon_jax.runs import saved, stored
from mixcon_jax.runs.checkpoints import Checkpoints, Meta
from mixcon_jax.runs.checksums import _sums, checksum, checksums
from mixcon_jax.runs.fingerprint import _digest
from mixcon_jax.runs.stored import consecutive


@pytest.mark.parametrize('shape', [(), (7,), (3, 5), (2, 3, 4), (4, 1, 9), (0, 3)])
@pytest.mark.parametrize('limit', [1, 4, 6, 100])
def test_consecutive_parts_are_the_array_in_its_order(shape, limit):
    array = np.arange(int(np.prod(shape))).reshape(shape)
    parts = [array[box].reshape(-1) for box in consecutive(shape, limit)]
    assert all(part.size <= limit for part in parts)
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, int), *parts]), array.reshape(-1))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float64', 'uint8'])
def test_the_sum_over_parts_is_that_of_the_whole(dtype):
    array = np.random.default_rng(3).integers(0, 99, (5, 6, 7)).astype(jnp.dtype(dtype))
    parts = [((i, j, 0), array[i : i + 2, j : j + 4]) for i in (4, 0, 2) for j in (0, 4)]
    whole = checksum([((0, 0, 0), array)], array.shape)
    assert checksum(parts, array.shape) == whole
    assert checksum([*parts[1:], ((0, 0, 0), parts[0][1])], array.shape) != whole
    if dtype != 'float64':
        assert checksums({'x': jnp.asarray(array)}) == {'x': whole}


def test_parts_of_a_save_are_small_and_sum_up(tmp_path, monkeypatch):
    """Saved whole by one device, it can be read by many: in parts no larger than the limit."""
    monkeypatch.setattr(stored, 'CHUNK', 4096)
    value = np.random.default_rng(1).standard_normal((6, 40, 64)).astype(np.float32)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({'params': {'x': jnp.asarray(value)}, 'step': jnp.int32(3)}, Meta(3, {}))
    checkpoints.wait()
    checkpoints.close()
    array = stored.open_array(tmp_path / '3' / 'model', 'params/x')
    parts = list(stored.chunks(array))
    assert len(parts) >= 15 and max(part.nbytes for _, part in parts) <= 4096
    assert checksum(parts, array.shape) == saved.contents(tmp_path, 3)['checksums']['params/x']
    assert _digest([('x', array)]) == _digest([('x', value)])  # from disk as from memory


@pytest.mark.parametrize('spec', [('a',), (None, 'a'), (('a', 'b'),), ('b', 'a')])
def test_no_device_gets_more_of_an_array_to_sum_it_up(spec):
    mesh = jax.make_mesh((4, 2), ('a', 'b'))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    program = _sums.lower(x).compile().as_text()
    assert 'all-reduce' in program
    assert not any(word in program for word in ('all-gather', 'all-to-all', 'collective-permute'))
