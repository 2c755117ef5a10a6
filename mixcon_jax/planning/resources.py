"""What Mosaic's kernels take of a multiprocessor, as their compilers say: registers, shared memory, spills.

Mosaic says as it lowers a kernel what shared memory that has; ptxas, for each program that is compiled, the rest.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PTXAS, LAYOUT, FOLDER = 'MOSAIC_GPU_DUMP_PTXAS', 'MOSAIC_GPU_DUMP_RESOURCES', 'MOSAIC_GPU_DUMP_TO'  # environment


@dataclass(frozen=True)
class Resources:
    """Of the programs of one kernel, which differ in shapes and options, the most of each.

    Attributes:
      name: as the kernel's source gives it.
      programs: that were compiled.
      registers: of a thread.
      shared_bytes: of a block, barriers included.
      spilled_bytes: that a thread stores to memory and loads from it for want of registers; 0 is well.
    """

    name: str
    programs: int
    registers: int
    shared_bytes: int
    spilled_bytes: int


@contextlib.contextmanager
def laid_out() -> Iterator[dict[str, int]]:
    """Fills a dict with the shared memory of the kernels lowered inside, the most by name, when it ends.

    Lowering alone: while a folder is asked for, compiling writes every stage of every kernel there.
    """
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        asked = {FOLDER: folder, LAYOUT: '1'}
        before = {name: os.environ[name] for name in asked if name in os.environ}
        os.environ |= asked
        try:
            yield found
        finally:
            for name in asked:
                del os.environ[name]
            os.environ |= before
        for path in Path(folder).glob('*.resources.txt'):
            name = path.name.rpartition('_')[0]
            found[name] = max(found.get(name, 0), shared_bytes(path.read_text(encoding='utf-8')))


def shared_bytes(text: str) -> int:
    """Of a block of a kernel, as Mosaic writes its resources."""
    scratch = sum(map(int, re.findall(r'smem_scratch_bytes=(\d+)', text)))
    return scratch + sum(8 * int(number) for number in re.findall(r'num_barriers=(\d+)', text))


def reported(text: str) -> list[tuple[str, int, int]]:
    """Name, registers and spilled bytes of every kernel of Mosaic's that ptxas reports on, where `PTXAS` is set."""
    found = []
    for report in text.split("Compiling entry function '")[1:]:
        kernel = re.match(r'(\w+)_mosaic_gpu_kernel', report)
        registers = re.search(r'Used (\d+) registers', report)
        # The first: where there are any, ptxas says so a second time.
        spills = re.search(r'stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads', report)
        if kernel and registers and spills:
            found.append((kernel[1], int(registers[1]), sum(map(int, spills.groups()))))
    return found


def summary(shared: dict[str, int], reports: str) -> list[Resources]:
    """One entry a kernel, by name, from what `laid_out` and ptxas say; of those that both name."""
    programs = reported(reports)
    found = []
    for name in sorted(shared):
        own = [(registers, spilled) for other, registers, spilled in programs if other == name]
        if own:
            registers, spilled = map(max, zip(*own, strict=True))
            found.append(Resources(name, len(own), registers, shared[name], spilled))
    return found
