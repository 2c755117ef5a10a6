"""Reads what Mosaic's compiler dumps of a kernel: registers, spills, shared memory, and its loops' instructions."""

import pathlib
import re
from collections import Counter
from dataclasses import dataclass

from mixcon_jax.planning import resources


@dataclass(frozen=True)
class Loop:
    """A backward branch and what lies between it and its target, by opcode; ``inner`` when no other loop is inside."""

    opcodes: Counter
    inner: bool

    def count(self, *prefixes: str) -> int:
        """Instructions whose opcode starts with one of the prefixes, all without any."""
        return sum(n for opcode, n in self.opcodes.items() if not prefixes or opcode.startswith(prefixes))


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    loops: tuple[Loop, ...]  # in the order of their branches, inner ones first
    opcodes: Counter  # of the whole kernel

    @property
    def inner(self) -> list[Loop]:
        """The innermost loops worth the name: waiting on a barrier takes a loop of a few instructions, too."""
        return [loop for loop in self.loops if loop.inner and loop.count() > 16]


def read(folder: pathlib.Path, name: str) -> Kernel:
    """Reads the dumps of the kernel ``name`` (MOSAIC_GPU_DUMP_TO, _PTXAS, _SASS_CTRL and _RESOURCES were set)."""
    (report,) = folder.glob(f'{name}_*.ptxas')
    ((_, registers, spilled),) = resources.reported(report.read_text())
    (used,) = folder.glob(f'{name}_*.resources.txt')  # numbered in another order
    opcodes, loops = _loops(report.with_suffix('.sass_ctrl').read_text())
    return Kernel(name, registers, spilled, resources.shared_bytes(used.read_text()), loops, Counter(opcodes))


def _loops(sass: str) -> tuple[list[str], tuple[Loop, ...]]:
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[str, int]] = []
    for line in sass.splitlines():
        if label := re.match(r'\s*(\.L_\w+):', line):
            labels[label[1]] = len(opcodes)
        elif instruction := re.search(r'/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)', line):
            if instruction[1] == 'BRA' and (target := re.search(r'`\((\.L_\w+)\)', instruction[2])):
                branches.append((target[1], len(opcodes)))
            opcodes.append(instruction[1])
    spans = [(labels[target], at) for target, at in branches if labels.get(target, at + 1) <= at]
    spans = [(first, last) for first, last in spans if last - first > 0]  # the endless loop behind the end

    def loop(first: int, last: int) -> Loop:
        inside = any(a >= first and b <= last and (a, b) != (first, last) for a, b in spans if b - a > 16)
        return Loop(Counter(opcodes[first : last + 1]), not inside)

    return opcodes, tuple(loop(*span) for span in spans)
