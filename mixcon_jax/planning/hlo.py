"""What a compiled module moves: its kernels, their operands' and results' bytes, read from XLA's optimised text.

A fusion is one kernel that reads its operands and writes its results; what it reads twice comes from a cache and counts
once. Of an operand that it only slices, or updates in place, the slice counts. A loop's body counts as often as XLA
knows it runs. Calls of kernels (`custom-call`) count their operands and results.
"""

import math
import re
from collections.abc import Iterator
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


def array_bytes(shape: str) -> int:
    """Bytes of an HLO shape, the sum for a tuple."""
    return sum(SIZES[kind] * math.prod(map(int, filter(None, dims.split(',')))) for kind, dims in ARRAY.findall(shape)
               if kind in SIZES)  # fmt: skip


def largest(text: str) -> int:
    """Elements of the largest array that a module's text names, in memory or inside a kernel, whatever its type."""
    # Of a Mosaic kernel the text holds a program, too, whose bytes could look like anything.
    lines = (line.partition('backend_config=')[0] for line in text.splitlines())
    arrays = (array for line in lines for array in ARRAY.findall(line))
    return max(math.prod(map(int, filter(None, dims.split(',')))) for kind, dims in arrays if kind in SIZES)


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


@dataclass
class Kernel:
    """One launch site: `count` launches, each moving `bytes`."""

    name: str
    kind: str
    bytes: int
    count: int
    shape: str
    operands: list[str] = field(default_factory=list)
    operation: str = ''

    @property
    def total(self) -> int:
        return self.bytes * self.count


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Computations by name, each its instructions by name, and the entry's name."""
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


def kernels(text: str) -> list[Kernel]:
    """Every kernel of an optimised module's text (`compiled.as_text()`), loops followed."""
    computations, entry = parse(text)
    return list(_walk(computations, entry, 1))


def _walk(computations, name: str, times: int) -> Iterator[Kernel]:
    body = computations[name]
    for instruction in body.values():
        opcode = instruction.opcode
        if opcode == 'while':
            trips = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', instruction.attributes)
            yield from _walk(computations, instruction.called('body'), times * int(trips.group(1) if trips else 1))
        elif opcode in ('call', 'async-start'):
            yield from _walk(computations, instruction.called('to_apply') or instruction.called('calls'), times)
        if opcode in NO_KERNEL or opcode.endswith('-done'):
            continue
        operands = [body[operand] for operand in instruction.operands]
        called = computations.get(instruction.called('calls')) if opcode.startswith('fusion') else None
        moved = _fusion_bytes(instruction, operands, called) if called else _plain_bytes(instruction, operands)
        kind = (re.search(r'kind=k(\w+)', instruction.attributes) or ['', opcode])[1]
        target = re.search(r'custom_call_target="([^"]+)"', instruction.attributes)
        if '__triton' in instruction.attributes:
            kind = 'triton'
        operation = re.search(r'op_name="([^"]*)"', instruction.attributes)
        yield Kernel(
            instruction.name, target.group(1) if target else kind, moved, times, instruction.shape,
            [operand.shape for operand in operands], operation.group(1) if operation else '',
        )  # fmt: skip


def _plain_bytes(instruction: Instruction, operands: list[Instruction]) -> int:
    result = array_bytes(instruction.shape)
    if instruction.opcode in SLICES:
        return 2 * result
    if instruction.opcode == 'dynamic-update-slice':
        return 2 * array_bytes(operands[1].shape)
    return result + sum(array_bytes(operand.shape) for operand in operands)


def _fusion_bytes(instruction: Instruction, operands: list[Instruction], body: dict[str, Instruction]) -> int:
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
        size = array_bytes(operands[int(inner.operands[0])].shape)
        # An operand updated in place isn't read; one that is only sliced is read as far as the slices go.
        updated = all(use.opcode == 'dynamic-update-slice' and use.operands[0] == name for name, use in uses)
        sliced = all(
            use.opcode in ('dynamic-slice', 'slice', 'gather') and use.operands[0] == name for name, use in uses
        )
        if uses and updated:
            continue
        total += min(size, sum(array_bytes(use.shape) for _, use in uses)) if uses and sliced else size
    root = next(inner for inner in body.values() if inner.root)
    for result in [body[name] for name in root.operands] if root.opcode == 'tuple' else [root]:
        behind = result
        while behind.opcode in ('bitcast', 'convert'):
            behind = body[behind.operands[0]]
        in_place = behind.opcode == 'dynamic-update-slice'
        total += array_bytes(body[behind.operands[1]].shape if in_place else result.shape)
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
