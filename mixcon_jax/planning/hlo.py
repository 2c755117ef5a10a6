"""What a compiled module moves: its kernels, their operands' and results' bytes, read from XLA's optimised text.

A fusion is one kernel that reads its operands and writes its results; what it reads twice comes from a cache and counts
once. Of an operand that it only slices, or updates in place, the slice counts. A loop's body counts as often as XLA
knows it runs; of a loop whose number of rounds depends on data the caller says how many to count, and its condition,
which the host waits for before every round and after the last, counts as well. Calls of kernels (`custom-call`) count
their operands and results, but for the bytes that cuBLAS may work in.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

SIZES = {
    'pred': 1, 's8': 1, 'u8': 1, 'f8e4m3fn': 1, 'f8e5m2': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2,
    's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8,
}  # fmt: skip
NO_KERNEL = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'iota', 'after-all', 'partition-id', 'while',
    'conditional', 'call', 'opt-barrier', 'async-start', 'async-done', 'async-update',
}  # fmt: skip
SLICES = {'dynamic-slice', 'slice', 'gather'}
INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$')
ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')
WORKSPACE = re.compile(r's8\[\d+\]')  # of cuBLAS, a result beside the product
GROUPS = re.compile(r'(?:replica_groups|source_target_pairs)=(.*?)(?:, [a-z_]+=|$)')


def array_bytes(shape: str, only: str = '') -> int:
    """Bytes of an HLO shape, the sum for a tuple; of the arrays of one type, such as 'f32', if it is given."""
    return sum(SIZES[kind] * math.prod(sizes(dims)) for kind, dims in ARRAY.findall(shape)
               if kind in SIZES and kind in (only or kind,))  # fmt: skip


def sizes(dims: str) -> list[int]:
    """The sizes of an array's dimensions, from their text."""
    return [int(size) for size in dims.split(',') if size]


def largest(text: str) -> int:
    """Elements of the largest array that a module's text names, in memory or inside a kernel, whatever its type."""
    # Of a Mosaic kernel the text holds a program, too, whose bytes could look like anything.
    lines = (line.partition('backend_config=')[0] for line in text.splitlines())
    arrays = (array for line in lines for array in ARRAY.findall(line))
    return max(math.prod(sizes(dims)) for kind, dims in arrays if kind in SIZES)


@dataclass
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    root: bool

    def called(self, attribute: str) -> str:
        found = re.search(rf'{attribute}=%?([\w.\-]+)', self.attributes)
        return found.group(1) if found else ''

    @property
    def operation(self) -> str:
        """What XLA names it after; '' of most that it has made itself."""
        return (re.search(r'op_name="([^"]*)"', self.attributes) or ['', ''])[1]

    @property
    def frame(self) -> int:
        """Where in the program's source it comes from, for `memory.Frames`; 0 is unknown."""
        found = re.search(r'stack_frame_id=(\d+)', self.attributes)
        return int(found[1]) if found else 0


@dataclass
class Kernel:
    """One launch site: `count` launches, each moving `bytes`.

    Attributes:
      float32: of the bytes, those of float32 arrays.
      flops: a launch's operations in matrix products, two a multiply-add; of custom calls, those of cuBLAS alone.
      groups: of an exchange, the text that says between which devices.
    """

    name: str
    kind: str
    bytes: int
    count: int
    shape: str
    operands: list[str] = field(default_factory=list)
    operation: str = ''
    float32: int = 0
    flops: int = 0
    groups: str = ''

    @property
    def total(self) -> int:
        return self.bytes * self.count


@dataclass
class Loop:
    """A loop of a module: how often it is entered, and the rounds each time.

    Attributes:
      rounds: None where they depend on data.
      counted: as many are counted.
    """

    name: str
    operation: str
    entered: int
    rounds: int | None
    counted: float = 1


Rounds = float | Callable[[str], float]  # to count of a loop whose number is not known, by what XLA names it after
Module = tuple[dict[str, dict[str, Instruction]], str]


def parse(text: str | Module) -> Module:
    """Computations by name, each its instructions by name, and the entry's name; what is parsed comes back as it is."""
    if not isinstance(text, str):
        return text
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ''
    current: dict[str, Instruction] | None = None
    for line in text.splitlines():
        header = re.match(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
        if header and not line.startswith(' '):
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
            continue
        found = INSTRUCTION.match(re.sub(r'/\*.*?\*/', '', line))
        if found and current is not None:
            name, shape, opcode, rest = found.groups()
            inside, attributes = _closing(rest)
            operands = re.findall(r'%([\w.\-]+)', inside)
            if opcode == 'parameter':
                operands = [inside]
            current[name] = Instruction(name, shape, opcode, operands, attributes, 'ROOT ' in line)
    return computations, entry


def _closing(rest: str) -> tuple[str, str]:
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == '(') - (character == ')')
        if depth == 0:
            return rest[:i], rest[i + 1 :]
    return rest, ''


def kernels(text: str | Module, rounds: Rounds = 1) -> list[Kernel]:
    """Every kernel of an optimised module's text (`compiled.as_text()`), loops followed.

    Args:
      text: of the module, or what `parse` makes of it.
      rounds: to count of a loop whose number of rounds is not known.
    """
    return [found for found in _walk(*parse(text), 1, rounds) if isinstance(found, Kernel)]


def totals(found: Sequence[Kernel]) -> dict[str, int]:
    """``kernels``, all launches, and what they move and compute together: ``bytes``, ``float32`` of them, ``flops``."""
    total = lambda of: sum(of(kernel) * kernel.count for kernel in found)
    return {
        'kernels': total(lambda kernel: 1), 'bytes': total(lambda kernel: kernel.bytes),
        'float32': total(lambda kernel: kernel.float32), 'flops': total(lambda kernel: kernel.flops),
    }  # fmt: skip


def loops(text: str | Module, rounds: Rounds = 1) -> list[Loop]:
    """Every loop of an optimised module's text; `rounds` as of `kernels`, for the loops inside."""
    return [found for found in _walk(*parse(text), 1, rounds) if isinstance(found, Loop)]


def _walk(computations, name: str, times: float, rounds: Rounds) -> Iterator[Kernel | Loop]:
    body = computations[name]
    for instruction in body.values():
        opcode = instruction.opcode
        if opcode == 'while':
            known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', instruction.attributes)
            trips = int(known[1]) if known else None
            guess = rounds(instruction.operation) if callable(rounds) else rounds
            counted = guess if trips is None else trips
            yield Loop(instruction.name, instruction.operation, round(times), trips, counted)
            yield from _walk(computations, instruction.called('body'), times * counted, rounds)
            if trips is None and instruction.called('condition'):
                yield from _walk(computations, instruction.called('condition'), times * (counted + 1), rounds)
        elif opcode in ('call', 'async-start'):
            called = instruction.called('to_apply') or instruction.called('calls')
            yield from _walk(computations, called, times, rounds)
        if opcode in NO_KERNEL or opcode.endswith('-done'):
            continue
        operands = [body[operand] for operand in instruction.operands]
        inside = computations.get(instruction.called('calls')) if opcode.startswith('fusion') else None
        call = source(instruction, computations)
        moved = [
            _fusion_bytes(operands, inside, call, only) if inside else _plain_bytes(instruction, operands, only)
            for only in ('', 'f32')
        ]
        kind = (re.search(r'kind=k(\w+)', instruction.attributes) or ['', opcode])[1]
        target = re.search(r'custom_call_target="([^"]+)"', call.attributes)
        if '__triton' in instruction.attributes:
            kind = 'triton'
        flops = sum(_flops(product, inside or body) for product in (inside or {instruction.name: instruction}).values())
        yield Kernel(
            instruction.name, target.group(1) if target else kind, moved[0], round(times), instruction.shape,
            [operand.shape for operand in operands], call.operation, moved[1], flops,
            (GROUPS.search(instruction.attributes) or ['', ''])[1],
        )  # fmt: skip


def source(instruction: Instruction, computations: Mapping[str, Mapping[str, Instruction]]) -> Instruction:
    """What says whence an instruction comes: of a fusion that slices what a kernel is called with, that call."""
    inside = computations.get(instruction.called('calls'), {}) if instruction.opcode == 'fusion' else {}
    return next((one for one in inside.values() if one.opcode == 'custom-call'), instruction)


def _flops(instruction: Instruction, body: dict[str, Instruction]) -> int:
    """Operations of a matrix product, by XLA's `dot` or cuBLAS; 0 of anything else."""
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.attributes)
    if instruction.opcode == 'custom-call' and '__cublas' in instruction.attributes:
        contracted = re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', instruction.attributes)
    elif instruction.opcode != 'dot':
        return 0
    result, left = (ARRAY.search(shape) for shape in (instruction.shape, body[instruction.operands[0]].shape))
    assert contracted and result and left, f'a product whose sizes are not to be read: {instruction}'
    lengths = sizes(left[2])
    return 2 * math.prod(sizes(result[2])) * math.prod(lengths[axis] for axis in sizes(contracted[1].replace('"', '')))


def _plain_bytes(instruction: Instruction, operands: list[Instruction], only: str) -> int:
    result = array_bytes(_written(instruction, instruction), only)
    if instruction.opcode in SLICES:
        return 2 * result
    if instruction.opcode == 'dynamic-update-slice':
        return 2 * array_bytes(operands[1].shape, only)
    return result + sum(array_bytes(operand.shape, only) for operand in operands)


def _written(result: Instruction, by: Instruction) -> str:
    return WORKSPACE.sub('', result.shape) if '__cublas' in by.attributes else result.shape


def _fusion_bytes(operands: list[Instruction], body: dict[str, Instruction], call: Instruction, only: str) -> int:
    users: dict[str, list[Instruction]] = {name: [] for name in body}
    for inner in body.values():
        for operand in inner.operands if inner.opcode != 'parameter' else ():
            users[operand].append(inner)

    def ends(name: str) -> list[tuple[str, Instruction]]:  # uses behind bitcasts and converts
        found = []
        for user in users[name]:
            found += ends(user.name) if user.opcode in ('bitcast', 'convert') and not user.root else [(name, user)]
        return found

    total = 0
    for inner in body.values():
        if inner.opcode != 'parameter':
            continue
        uses = ends(inner.name)
        operand = operands[int(inner.operands[0])].shape
        size = array_bytes(operand, only)
        # An operand updated in place isn't read; one that is only sliced is read as far as the slices go.
        updated = all(use.opcode == 'dynamic-update-slice' and use.operands[0] == name for name, use in uses)
        sliced = all(
            use.opcode in ('dynamic-slice', 'slice', 'gather') and use.operands[0] == name for name, use in uses
        )
        if uses and updated:
            continue
        # Slices behind a convert are of another type: what is read is as wide as the operand.
        part = sum(largest(use.shape) for _, use in uses) / largest(operand) if uses and sliced else 1
        total += round(size * min(1, part))
    root = next(inner for inner in body.values() if inner.root)
    for result in [body[name] for name in root.operands] if root.opcode == 'tuple' else [root]:
        behind = result
        while behind.opcode in ('bitcast', 'convert'):
            behind = body[behind.operands[0]]
        in_place = behind.opcode == 'dynamic-update-slice'
        total += array_bytes(body[behind.operands[1]].shape if in_place else _written(result, call), only)
    return total


def summary(found: list[Kernel], least: int = 0) -> str:
    """Lines of the kernels that move at least so many bytes, largest first, and the sums."""
    lines = [f'{"kernel":44}{"kind":>22}{"launches":>10}{"MiB":>10}{"MiB in all":>12}  result']
    for kernel in sorted(found, key=lambda kernel: -kernel.total):
        if kernel.total >= least:
            lines.append(
                f'{kernel.name[:43]:44}{kernel.kind[:21]:>22}{kernel.count:10}{kernel.bytes / 2**20:10.1f}'
                f'{kernel.total / 2**20:12.1f}  {re.sub(r"{[^}]*}", "", kernel.shape)[:70]}'
            )
    launches = sum(kernel.count for kernel in found)
    lines.append(f'{launches} launches, {sum(kernel.total for kernel in found) / 2**20:.1f} MiB')
    return '\n'.join(lines)
