"""What memory a compiled module holds: its large arrays, with the lines that they come from, and what loops keep."""

import dataclasses
import re

from mixcon_jax.planning.hlo import ARRAY, NO_KERNEL, Instruction, Module, array_bytes, parse, sizes, source

MODELS = ('mixcon_jax/', 'kernels_pallas/')  # where a model's lines are; below them lie JAX's


@dataclasses.dataclass(frozen=True)
class Large:
    """One kind of array that a module writes.

    Attributes:
      shape: as XLA writes it, without its layout.
      bytes: of one.
      count: instructions that write one of that shape at that line.
      line: ``path:number function`` in our sources, '' if unknown.
      operation: as XLA names it.
    """

    shape: str
    bytes: int
    count: int
    line: str
    operation: str


class Frames:
    """The source lines of a module's text, by the number of a stack frame."""

    def __init__(self, text: str) -> None:
        head = text[: text.find('\n%')] if '\n%' in text else text
        tables = {
            name: dict(re.findall(r'^(\d+) (.*)$', body, re.MULTILINE))
            for name, body in re.findall(
                r'^(FileNames|FunctionNames|FileLocations|StackFrames)\n((?:\d+ .*\n)*)', head, re.MULTILINE
            )
        }
        self._files, self._functions = tables.get('FileNames', {}), tables.get('FunctionNames', {})
        self._locations, self._frames = tables.get('FileLocations', {}), tables.get('StackFrames', {})

    def line(self, frame: int) -> str:
        """The innermost line of ours above a frame, ``mixcon_jax/step.py:159 loss``; '' where there is none."""
        seen: set[str] = set()
        number = str(frame)
        while number in self._frames and number not in seen:
            seen.add(number)
            numbers = dict(re.findall(r'(\w+)=(\d+)', self._frames[number]))
            place = dict(re.findall(r'(\w+)=(\d+)', self._locations.get(numbers['file_location_id'], '')))
            path = self._files.get(place.get('file_name_id', ''), '').strip('"')
            for folder in MODELS:
                if folder in path:
                    name = self._functions.get(place.get('function_name_id', ''), '').strip('"')
                    return f'{folder}{path.rpartition(folder)[2]}:{place["line"]} {name}'
            number = numbers.get('parent_frame_id', '')
        return ''


def largest_arrays(text: str, module: Module | None = None, most: int = 10) -> list[Large]:
    """The largest arrays that kernels write outside of arguments, alike ones as one entry, largest first.

    Args:
      text: of the optimised module.
      module: `hlo.parse` of it, where that is at hand.
      most: entries.
    """
    computations, _ = module or parse(text)
    frames = Frames(text)
    inside = {
        instruction.called(attribute)
        for body in computations.values()
        for instruction in body.values()
        for attribute in ('calls', 'to_apply')
        if instruction.opcode not in ('call', 'async-start')
    }
    found: dict[tuple[str, str], list[Instruction]] = {}
    for name, body in computations.items():
        for instruction in body.values() if name not in inside else ():
            if instruction.opcode in NO_KERNEL or instruction.opcode.endswith('-done'):
                continue
            line = frames.line(source(instruction, computations).frame)
            for kind, dims in set(ARRAY.findall(instruction.shape)):
                if kind != 's8':  # what cuBLAS works in
                    found.setdefault((f'{kind}[{dims}]', line), []).append(instruction)
    ranked = sorted(found.items(), key=lambda item: -array_bytes(item[0][0]))
    return [
        Large(shape, array_bytes(shape), len(group), line, source(group[0], computations).operation)
        for (shape, line), group in ranked[:most]
    ]


def kept_by_loops(text: str | Module, rounds: int) -> int:
    """Bytes of what the forward loop over blocks stacks up for the backward pass, on one device.

    These are the results of loops of the forward pass (named ``jvp`` but not ``transpose``) with one entry a round,
    that the loop writes slice by slice. 0 where XLA has unrolled the loop.

    Args:
      text: of the optimised module, or what `hlo.parse` makes of it.
      rounds: blocks of the model.
    """
    computations, _ = parse(text)
    most = 0
    for body in computations.values():
        for loop in body.values():
            operation = loop.operation
            if loop.opcode != 'while' or 'jvp(' not in operation or 'transpose(' in operation:
                continue
            trips = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
            if not trips or int(trips[1]) != rounds or operation.count('while') > 2:
                continue
            inner = computations[loop.called('body')]
            root = next(one for one in inner.values() if one.root)
            total = 0
            for index, name in enumerate(root.operands):
                result = inner[name]
                through = result.opcode == 'get-tuple-element' and f'index={index}' in re.split(
                    r'[,\s]+', result.attributes
                )
                leading = [sizes(dims) for _, dims in ARRAY.findall(result.shape)]
                if not through and leading and leading[0][:1] == [rounds] and len(leading[0]) > 1:
                    total += array_bytes(result.shape)
            most = max(most, total)
    return most
