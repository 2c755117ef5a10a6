"""What devices send one another in a compiled module: collectives, their bytes, the axes they go over."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from mixcon_jax.planning.hlo import Kernel, array_bytes, kernels

COLLECTIVES = ('collective-permute', 'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'ragged-all-to-all')


def collectives(module: str) -> dict[str, tuple[int, int]]:
    """``{kind: (number, bytes)}`` of an optimised module's text, loops followed."""
    found = dict.fromkeys(COLLECTIVES, (0, 0))
    for kernel in kernels(module):
        kind = re.sub('-start$', '', kernel.kind)
        if kind in found:
            number, total = found[kind]
            found[kind] = number + kernel.count, total + kernel.count * payload(kernel)
    return found


def of_sequence(found: dict[str, tuple[int, int]]) -> int:
    """Bytes of all collectives but the sums, which are over parameters' gradients and statistics."""
    return sum(size for kind, (_, size) in found.items() if kind != 'all-reduce')


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Exchanges of one kind along the same axes of the mesh, added up over a step.

    Attributes:
      kind: of `COLLECTIVES`.
      axes: of the mesh, joined by '+'; 'one device' where a group has a single one.
      hosts: number of hosts that a group spans at most.
      count: exchanges a step.
      bytes: of the whole arrays, on one device: what a gather gives, what a sum takes.
      sent: bytes that one device sends, by rings: (n - 1) / n of them in a group of n, twice that in an all-reduce.
      across: of what is sent, the bytes that one device's port to other hosts carries.
    """

    kind: str
    axes: str
    hosts: int
    count: int
    bytes: int
    sent: float
    across: float


def exchanges(found: Sequence[Kernel], mesh: Mapping[str, int], host_of: Sequence[int]) -> list[Exchange]:
    """All exchanges of a compiled step, the largest sums of bytes first.

    Args:
      found: from `hlo.kernels`.
      mesh: sizes of the mesh's axes, outermost first; devices are numbered along it.
      host_of: the host of every device, numbered so.
    """
    sums: dict[tuple[str, str, int], np.ndarray] = {}
    for kernel in found:
        kind = re.sub('-start$', '', kernel.kind)
        if kind not in COLLECTIVES:
            continue
        groups = groups_of(kernel.groups, math.prod(mesh.values()))
        members = len(groups[0])
        hosts = max(len({host_of[device] for device in group}) for group in groups)
        size = payload(kernel)
        sent = size if kind == 'collective-permute' else size * (members - 1) / members * (1 + (kind == 'all-reduce'))
        across = 0.0
        if hosts > 1 and kind in ('all-to-all', 'ragged-all-to-all'):  # each device's own rows leave by its own port
            across = size * (hosts - 1) / hosts
        elif hosts > 1:  # rings leave a host by as many ports as the group has devices there
            across = sent / (1 if kind == 'collective-permute' else math.ceil(members / hosts))
        key = kind, axes_of(groups, mesh), hosts
        one = np.array([1, size, sent, across], float) * kernel.count
        sums[key] = sums.get(key, 0) + one
    listed = [Exchange(*key, int(row[0]), int(row[1]), float(row[2]), float(row[3])) for key, row in sums.items()]
    return sorted(listed, key=lambda exchange: -exchange.bytes)


def payload(kernel: Kernel) -> int:
    """Bytes of the whole array of one exchange: the larger of what a device gives and gets."""
    given, got = sum(map(array_bytes, kernel.operands)), array_bytes(kernel.shape)
    if kernel.kind.endswith('-start'):  # its result may list what it takes as well
        got -= given
    return max(given, got)


def groups_of(text: str, devices: int) -> list[list[int]]:
    """The groups of devices of an exchange, as XLA writes them: listed, by a reshaped range, or by a mesh's axes."""
    if text.startswith('mesh['):
        shape, names = (
            re.findall(r"'([^']+)'=(\d+)", text),
            re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text[text.index(']') :]),
        )
        order = re.search(r'device_ids=\(([^)]*)\)', text)
        sizes: list[int] = []
        axes: list[int] = []
        for name, size in shape:
            parts = [(int(before), int(part)) for other, before, part in names if other == name and part]
            if any(other == name and not part for other, _, part in names):
                axes.append(len(sizes))
            elif parts:  # a part of an axis: what lies before it, itself, the rest
                before, part = parts[0]
                axes.append(len(sizes) + 1)
                sizes += [before, part]
                size = int(size) // before // part
            sizes.append(int(size))
        numbers = _range(order[1]) if order and '<=' in order[1] else np.arange(math.prod(sizes))
        numbers = numbers.reshape(sizes)
        members = math.prod(sizes[axis] for axis in axes)
        rest = [axis for axis in range(len(sizes)) if axis not in axes]
        return numbers.transpose(*rest, *axes).reshape(-1, members).tolist()
    if '<=' in text:
        shape = [int(size) for size in re.search(r'\[([\d,]*)\]<=', text)[1].split(',')]  # type: ignore[index]
        return _range(text).reshape(shape).tolist()
    found = [[int(number) for number in group.split(',')] for group in re.findall(r'\{([\d,]+)\}', text)]
    return found or [list(range(devices))]


def _range(text: str) -> np.ndarray:
    """``[…]<=[4,2]T(1,0)``: the numbers, flat."""
    found = re.search(r'<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
    assert found, text
    sizes = [int(size) for size in found[1].split(',')]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return (numbers.transpose([int(axis) for axis in found[2].split(',')]) if found[2] else numbers).reshape(-1)


def axes_of(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> str:
    """The axes of the mesh along which the members of a group differ."""
    places = np.stack([np.unravel_index(group, tuple(mesh.values())) for group in groups])  # [groups, axes, members]
    differs = (places != places[:, :, :1]).any(axis=(0, 2))
    return '+'.join(axis for axis, each in zip(mesh, differs) if each) or 'one device'
