"""Restoring reads no more at once than it says, and yet whatever one device needs, however the state was written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.serialization.limits import LimitInFlightBytes

from mixcon_jax.errors import UserError
from mixcon_jax.host import processes
from mixcon_jax.runs import restoring, stored
from mixcon_jax.runs.checkpoints import Checkpoints, Meta
from mixcon_jax.runs.saved import Damaged

SHAPE = (24, 64)  # 6 KiB


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """A checkpoint of twelve arrays split along their rows, in parts of 768 bytes; and the arrays."""
    folder, mesh = tmp_path_factory.mktemp('written'), jax.make_mesh((8,), ('a',))
    rng = np.random.default_rng(0)
    arrays = {f'x{i}': rng.standard_normal(SHAPE).astype(np.float32) for i in range(12)}
    rows = NamedSharding(mesh, PartitionSpec('a'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, 'CHUNK', 768)
        checkpoints = Checkpoints(folder)
        params = {name: jax.device_put(array, rows) for name, array in arrays.items()}
        checkpoints.save({'params': params, 'step': jnp.int32(3)}, Meta(3, {}))
        checkpoints.wait()
        checkpoints.close()
    return folder, mesh, arrays


@pytest.mark.parametrize(
    'spec, limit, part',
    [
        (('a',), 2000, 768),  # as it was written
        ((None, 'a'), 2000, 6144),  # columns, for each of which all that was written must be read
        ((), 7000, 6144),
        ((), 100, 6144),
    ],
)
def test_what_is_read_at_once_is_bounded_by_the_limit_or_one_devices_part(written, monkeypatch, spec, limit, part):
    folder, mesh, arrays = written
    monkeypatch.setattr(restoring, 'IN_FLIGHT', limit)
    most, wait = [0], LimitInFlightBytes.wait_for_bytes

    async def noted(self, size: int) -> None:
        await wait(self, size)
        most[0] = max(most[0], self._max_bytes - self._available_bytes)

    monkeypatch.setattr(LimitInFlightBytes, 'wait_for_bytes', noted)
    wanted = {
        f'params/{name}': jax.ShapeDtypeStruct(SHAPE, 'float32', sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for name in arrays
    }
    restored = restoring.restore(folder / '3' / 'model', wanted)
    for name, array in arrays.items():
        np.testing.assert_array_equal(restored[f'params/{name}'], array)
        assert restored[f'params/{name}'].sharding == wanted[f'params/{name}'].sharding
    assert part <= most[0] <= max(limit, part) + 1


def test_summing_up_a_spread_array_leaves_no_copy_of_it_behind(written):
    """JAX keeps the copy that an array is asked for whole."""
    folder, mesh, arrays = written
    spread = jax.device_put(arrays['x0'], NamedSharding(mesh, PartitionSpec('a')))
    checkpoints = Checkpoints(folder, read_only=True)
    restored, _ = checkpoints.load(shardings={'params/x0': spread.sharding})
    checkpoints.close()
    assert restored['params']['x0']._npy_value is None
    np.asarray(spread)
    assert spread._npy_value is not None


MANY = [
    (['', 'Missing:meta: FileNotFoundError'], UserError, r'not there \(process 1 of 2\).*mounted'),
    (['Missing:meta: gone', 'Missing:meta: gone'], Damaged, 'meta: gone'),
    (['', 'Damaged:x does not match'], Damaged, r'x does not match \(process 1 of 2\)'),
    (['Damaged:x', 'UserError:4 cannot be read (stale)'], UserError, r'4 cannot be read \(stale\) \(process 1 of 2\)'),
]


@pytest.mark.parametrize('reasons, kind, words', MANY)
def test_what_one_process_cannot_read_all_give_up_and_only_what_is_damaged_counts_as_that(
    monkeypatch, reasons, kind, words
):
    monkeypatch.setattr(processes, 'of_each', lambda own: reasons)
    with pytest.raises(kind, match=words):
        restoring.verified(lambda: ('meta', {}, {}))
