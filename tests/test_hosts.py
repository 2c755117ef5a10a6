"""Where the devices of several processes and networks lie on a mesh, and which rows each process reads."""

import dataclasses

import jax
import numpy as np
import pytest

from mixcon_jax import config as configs
from mixcon_jax.config import ConfigError
from mixcon_jax.data import Share
from mixcon_jax.errors import UserError
from mixcon_jax.parallel import layout
from mixcon_jax.parallel.axes import AXES
from mixcon_jax.parallel.mesh import arrange, crossing, make_mesh
from mixcon_jax.planning import compiling
from tests.training import random_batch


@dataclasses.dataclass(frozen=True)
class Device:
    """All that is asked of a device."""

    id: int
    process_index: int
    slice_index: int | None = None


def shape_of(**axes: int) -> dict[str, int]:
    return dict.fromkeys(AXES, 1) | axes


def hosts(count: int, each: int, in_slice: int = 0) -> list[Device]:
    """Devices of hosts, of which every ``in_slice`` have a network of their own."""
    return [Device(i, i // each, i // each // in_slice if in_slice else None) for i in range(count * each)]


def groups(grid: np.ndarray, axis: str, of: str) -> list[set[int]]:
    """For each group of devices that differ along this axis alone, in what they lie."""
    lines = np.moveaxis(grid, AXES.index(axis), -1).reshape(-1, grid.shape[AXES.index(axis)])
    return [{getattr(device, of) for device in line} for line in lines]


def test_one_hosts_devices_keep_their_order():
    devices = [Device(i, 0) for i in (3, 1, 0, 2)]
    assert arrange(devices, shape_of(data=2, tensor=2)).ravel().tolist() == devices


@pytest.mark.parametrize('seed', range(3))
def test_the_last_axes_stay_within_a_host_however_devices_come(seed):
    devices = hosts(4, 8, in_slice=1)
    np.random.default_rng(seed).shuffle(devices)
    grid = arrange(devices, shape_of(data=2, fsdp=2, expert=2, context=2, tensor=2))
    assert sorted(device.id for device in grid.ravel()) == list(range(32))
    for axis in ('expert', 'context', 'tensor'):
        assert all(len(found) == 1 for found in groups(grid, axis, 'process_index')), axis
    assert crossing(grid) == ('data', 'fsdp')
    assert crossing(arrange(devices, shape_of(fsdp=2, tensor=16))) == ('fsdp', 'tensor')


def test_hosts_of_a_network_lie_side_by_side_whatever_their_numbers():
    """A scheduler may number hosts across networks in turn."""
    devices = [Device(i, i // 4, i // 4 % 2) for i in range(16)]
    grid = arrange(devices, shape_of(data=2, expert=2, tensor=4))
    assert all(len(found) == 1 for axis in ('expert', 'tensor') for found in groups(grid, axis, 'slice_index'))


@pytest.mark.parametrize(
    'slices, axes, parts',
    [
        (2, {'data': 2, 'fsdp': 8}, {'data': 2, 'fsdp': 1}),
        (2, {'data': 4, 'fsdp': 2, 'tensor': 2}, {'data': 2, 'fsdp': 1}),
        (4, {'data': 2, 'fsdp': 4, 'expert': 2}, {'data': 2, 'fsdp': 2}),
        (4, {'data': 6, 'fsdp': 4}, {'data': 2, 'fsdp': 2}),
        (2, {'fsdp': 8, 'context': 2}, {'data': 1, 'fsdp': 2}),
    ],
)
def test_only_data_and_then_fsdp_go_across_slices(slices, axes, parts):
    """In as few parts as there can be: what a gather or a sum crosses the slow network with."""
    shape = shape_of(**axes)
    size = int(np.prod(list(shape.values()))) // slices
    grid = arrange(hosts(slices * 2, size // 2, in_slice=2), shape, slices)
    for axis in AXES:
        assert {len(found) for found in groups(grid, axis, 'slice_index')} == {parts.get(axis, 1)}, axis
        # Along an axis those of one slice are neighbours.
        line = [device.slice_index for device in np.moveaxis(grid, AXES.index(axis), -1).reshape(-1, shape[axis])[0]]
        assert np.count_nonzero(np.diff(line)) == parts.get(axis, 1) - 1
    assert sorted(device.id for device in grid.ravel()) == list(range(slices * size))


def test_slices_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r'mesh.slices=4 must divide mesh.data x mesh.fsdp = 2 x 1'):
        arrange(hosts(4, 4), shape_of(data=2, tensor=8), 4)
    with pytest.raises(ConfigError, match=r'mesh.slices=2 would cut a process in two'):
        arrange(hosts(3, 4), shape_of(data=2, tensor=6), 2)
    config = configs.default()
    config.mesh.update(data=1, fsdp=3, slices=2)
    with pytest.raises(ConfigError, match=r'mesh.slices=2 must divide mesh.data x mesh.fsdp = 1 x 3'):
        configs.validate(config)


def absent_mesh(hosts: int, each: int, **axes: int):
    """A mesh of GPUs that are not here."""
    config = configs.default().mesh
    config.update({'data': 1} | axes)
    return make_mesh(config, compiling.devices('h100', hosts, each))


@pytest.mark.parametrize(
    'count, each, axes, parts',
    [
        (2, 4, {'fsdp': 8}, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (2, 4, {'context': 8}, [(0,), (0,)]),
        (2, 4, {'fsdp': 2, 'tensor': 4}, [(0,), (1,)]),
        (4, 2, {'data': 2, 'tensor': 4}, [(0,), (0,), (1,), (1,)]),
        (3, 4, {'data': 2, 'tensor': 6}, [(0,), (0, 1), (1,)]),
        (2, 4, {'data': 2, 'fsdp': 2, 'tensor': 2, 'slices': 2}, [(0, 1), (2, 3)]),
        (4, 6, {'data': 6, 'fsdp': 4, 'slices': 4}, [(0, 1, 4, 5, 8, 9), (2, 3, 6, 7, 10, 11),
                                                     (12, 13, 16, 17, 20, 21), (14, 15, 18, 19, 22, 23)]),
    ],
)  # fmt: skip
def test_a_process_reads_the_rows_of_its_devices(monkeypatch, count, each, axes, parts):
    mesh = absent_mesh(count, each, **axes)
    for process in range(count):
        monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
        own, number = layout.own_rows(mesh)
        assert own == parts[process]
        rows = Share(own, number).rows(4 * number, 'train.batch_size')
        assert rows == [row for part in own for row in range(4 * part, 4 * part + 4)]
    with pytest.raises(UserError, match=r'train.batch_size: 7 rows cannot be divided into 2 equal parts'):
        Share((1,), 2).rows(7, 'train.batch_size')


def test_rows_are_placed_as_they_are_read():
    """In one process the batch is whole; its devices hold their own rows of it."""
    config = configs.default().mesh
    config.update(data=2, fsdp=2, context=2)
    mesh, batch = make_mesh(config), random_batch(1, 12, 5)
    placed = layout.place_rows(batch, mesh)
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].sharding == layout.batch_sharding(mesh)
        assert {shard.data.shape for shard in placed[name].addressable_shards} == {(3, 5)}
    with pytest.raises(ConfigError, match=r'a batch of 10 rows does not split over .* = 4 devices'):
        layout.place_rows(random_batch(1, 10, 5), mesh)
