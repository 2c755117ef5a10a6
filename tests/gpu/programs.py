"""What the GPU kernels are compiled to, case by case: so that a card outlives a change that changes no program.

A card (kernels_pallas/cards.py) is stale as soon as a line of its kernel's sources changes, though most changes of form
leave every program as it was, and a GPU would run the same instructions. Where none is at hand:

    python -m tests.gpu.programs --out before.json     # at the commit whose cards count
    python -m tests.gpu.programs --carry before.json   # after the change

The second compiles every case again, for an H100 that is absent, and gives the new sources' hash to the cards of those
variants all of whose programs are the same: the PTX, the host's code that launches it (grid, shared memory, tensor
maps), and XLA's operations around it. The card keeps the hash of the sources that a GPU ran. What no case covers, such
as which calls a kernel refuses, is for the other tests.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from typing import Any

from kernels_pallas import cards

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = 'h100'
LAST = 'GpuAssemblyToBinaryPass'  # before it a module holds the PTX as text, and the host's code
REGISTER = r'%(?:p|r|rd|rs|f|fd|h)\d+\b'
COMPUTES = re.compile(  # an instruction that writes one register and does nothing else
    r'(?:mov|cvta?|add|sub|mul|mad|fma|shl|shr|and|or|xor|not|neg|abs|min|max|setp|selp|ex2|lg2|rcp|div|rem|prmt|lop3|'
    rf'bfe|shf|ld\.param)\.[\w.:]+ {REGISTER}, [^;]*;'
).fullmatch


def compiled(kernel: str) -> dict[str, dict[str, str]]:
    """A digest of what each case of a kernel is compiled to, by variant and case; Mosaic must be asked to dump."""
    import jax

    from kernels_pallas import cases
    from mixcon_jax.planning import compiling

    device = compiling.devices(TARGET)[0]
    folder = pathlib.Path(os.environ['MOSAIC_GPU_DUMP_TO'])
    found: dict[str, dict[str, str]] = {}
    for case in cases.of(kernel)[0]:

        def graded(arrays: Any, cotangents: Any, case: Any = case) -> Any:
            outputs, pull = jax.vjp(lambda arrays: case.kernel(arrays, None), arrays)
            return outputs, pull(cotangents)[0]

        for dump in folder.iterdir():
            dump.unlink()
        jax.clear_caches()
        arrays = jax.eval_shape(case.draw)
        with jax.default_device(device):
            refusal = case.refusal()
            outputs = None if refusal else jax.eval_shape(lambda arrays, case=case: case.kernel(arrays, None), arrays)
        text = f'refused: {refusal}'
        if outputs is not None:
            program = compiling.compile_for(device, graded, arrays, outputs)
            text = '\n'.join([*_programs(folder), _around(program.as_text())])
        found.setdefault(case.variant, {})[case.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def _programs(folder: pathlib.Path) -> list[str]:
    """Each kernel that Mosaic compiled: its PTX and the host's code, without names of files and lines."""
    logs = sorted(folder.glob('*.mlir-passes.log'), key=lambda path: int(re.findall(r'_(\d+)\.', path.name)[-1]))
    return [_module(log.read_text()) for log in logs]


def _module(log: str) -> str:
    (module,) = re.findall(rf'IR Dump Before {LAST}: .*?\n(.*?)(?=\n// -----// IR Dump|\Z)', log, re.DOTALL)
    module = re.sub(r'^#loc.*\n', '', module, flags=re.MULTILINE)
    module = re.sub(r' loc\((?:[^()"]|"[^"]*"|\((?:[^()"]|"[^"]*")*\))*\)', '', module)
    module = re.sub(r'mosaic_gpu\.dump_basename = "[^"]*"', '', module)
    return re.sub(
        r'assembly = "((?:[^"\\]|\\.)*)"',
        lambda found: _ptx(found[1].replace(r'\0A', '\n').replace(r'\09', '\t')),
        module,
    )


def _ptx(text: str) -> str:
    """A program up to the order of instructions that only compute, and the numbers of registers.

    What is left, in its order, are the instructions that do something: branches, barriers, memory, exchanges between
    threads, and writes to a register that has several. In place of any other register stands what it is computed from;
    of a register that has several writes, also which is the last above, and in which block that is read.
    """
    idle = r'//.*|\.(?:loc|file|reg)\b.*|\$L__(?:tmp|func_begin|func_end)\w*:'
    lines = [' '.join(line.split()) for line in text.partition('\t.section')[0].splitlines()]
    lines = [line for line in lines if line and not re.fullmatch(idle, line)]
    writes = Counter(register for line in lines for register in _written(line))
    acting: list[str] = []
    computed: dict[str, tuple[str, str]] = {}  # operation and operands, by the register that they give
    seen: Counter[str] = Counter()
    block = 0
    for line in lines:
        written = _written(line)
        block += line.endswith(':')
        if COMPUTES(line) and writes[written[0]] == 1:
            operation, _, operands = line.partition(f' {written[0]}, ')
            when = lambda found, block=block: (
                f'{found[0]}@{seen[found[0]]}.{block}' if writes[found[0]] > 1 else found[0]
            )
            computed[written[0]] = operation, re.sub(REGISTER, when, operands)
        else:
            acting.append(line)
            seen.update(written)

    names: dict[str, str] = {}
    for line in acting:  # first, so that a register's number does not hang on who computes with it
        for register in re.findall(REGISTER, line):
            if register not in computed:
                names.setdefault(register, f'%{len(names)}')

    def name(found: re.Match) -> str:
        register = found[0]
        if register not in names:
            operation, operands = computed[register]
            source = f'{operation} {re.sub(REGISTER, name, operands)}'
            names[register] = hashlib.sha256(source.encode()).hexdigest()[:16]
        return names[register]

    return '\n'.join(re.sub(REGISTER, name, line) for line in acting)


def _written(line: str) -> list[str]:
    """The registers that an instruction may write: those of its first operand."""
    operand = re.match(rf'(?:@!?{REGISTER} )?[a-z][\w.:]* (\{{[^}}]*\}}|[^,;\[]+)', line)
    return re.findall(REGISTER, operand[1]) if operand else []


def _around(text: str) -> str:
    """XLA's operations, without where in our sources they come from and without the kernels' own text."""
    body = re.search(r'^(%|ENTRY)', text, re.MULTILINE)
    text = text[body.start() :] if body else text
    text = re.sub(r', metadata=\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}', '', text)
    return re.sub(r'(custom_call_target="mosaic_gpu\w*".*), backend_config=.*', r'\1', text)


# ---------------------------------------------------------------------------------------------------- all kernels
def digests(kernels: list[str]) -> dict[str, Any]:
    """`compiled` of every kernel, each in a process of its own, with what it depends on."""
    import jax

    found = {}
    for kernel in kernels:
        print(f'compiling the cases of {kernel}', file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {
                'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_COMPILATION_CACHE': 'false', cards.TRUST: '1',
                'MOSAIC_GPU_DUMP_TO': folder, 'MOSAIC_GPU_DUMP_PTX': '1',
            }  # fmt: skip
            command = [sys.executable, '-m', 'tests.gpu.programs', '--kernel', kernel]
            done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found[kernel] = {'sources': cards.source_hash(kernel), 'variants': json.loads(done.stdout)}
    return {'jax': jax.__version__, 'target': TARGET, 'kernels': found}


def carry(before: dict[str, Any], now: dict[str, Any], card: cards.Card) -> tuple[cards.Card, str]:
    """A card with the hash of the sources that are here, if it is still one of what they are compiled to.

    Returns:
      The card, new or as it was, and in words what was found.
    """
    name = f'{card.kernel} ({card.variant}) on {card.device}'
    was, is_now = (found['kernels'].get(card.kernel) for found in (before, now))
    if was is None or is_now is None:
        return card, f'{name}: not compiled'
    if card.sources == is_now['sources']:
        return card, f'{name}: its sources are as they were'
    if card.sources != was['sources']:
        return card, f'{name}: not of the sources that were compiled before'
    if (before['jax'], before['target']) != (now['jax'], now['target']):
        return card, f'{name}: compiled by jax {before["jax"]} before and {now["jax"]} now'
    old, new = (found['variants'].get(card.variant, {}) for found in (was, is_now))
    if not old or old.keys() != new.keys():
        return card, f'{name}: other cases than before'
    if changed := [case for case in old if old[case] != new[case]]:
        return card, f'{name}: another program for {len(changed)} of {len(old)} cases, the first {changed[0]}'
    ran = card.ran or card.sources
    return dataclasses.replace(card, sources=is_now['sources'], ran=ran), f'{name}: the same {len(old)} programs'


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--out', type=pathlib.Path, help='write the digests of all programs here')
    what.add_argument('--carry', type=pathlib.Path, help='compare with these, and carry the cards whose are the same')
    what.add_argument('--kernel', help='what it starts a process for: print the digests of one kernel')
    options = parser.parse_args(arguments)
    if options.kernel:
        print(json.dumps(compiled(options.kernel)))
        return 0
    if options.out:
        options.out.write_text(json.dumps(digests(cards.kernels()), indent=1))
        return 0
    before, stale = json.loads(options.carry.read_text()), 0
    now = digests(cards.kernels())
    for kernel in cards.kernels():
        found = [carry(before, now, card) for card in cards.shipped(kernel)]
        for card, words in found:
            print(words)
            stale += not card.current
        cards.write(cards.PACKAGE / kernel / cards.FILE, [card for card, _ in found])
    return 1 if stale else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
