"""What the GPU kernels are compiled to, case by case: so that a card outlives a change that changes no program.

A card (kernels_pallas/cards.py) is stale as soon as a line of its kernel's sources changes, though most changes of form
leave every program as it was, and a GPU would run the same instructions. Where none is at hand:

    python -m tests.gpu.programs --out before.json     # at the commit whose cards count
    python -m tests.gpu.programs --carry before.json   # after the change

The second compiles every case again, for an H100 that is absent, and gives the new sources' hash to the cards of those
variants all of whose programs are the same: the PTX, the host's code that launches it (grid, shared memory, tensor
maps), and the operations around it, as they are handed to XLA. The card keeps the hash of the sources that a GPU ran.
What no case covers, such as which calls a kernel refuses, is for the other tests.
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
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kernels_pallas import cards
from mixcon_jax.planning.hardware import TARGETS

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = 'h100'
REFUSED = 'refused'
LAST = 'GpuAssemblyToBinaryPass'  # before it a module holds the PTX as text, and the host's code
STRING = r'"(?:[^"\\]|\\.)*"'
REGISTER = r'%(?:p|r|rd|rs|f|fd|h)\d+\b'
SOURCE = rf'(?:{REGISTER}|%(?:tid|ctaid|ntid|nctaid)\.[xyz]|%laneid|[-\w.]+)'
COMPUTES = re.compile(  # an instruction that writes one register and does nothing else
    r'(?:(?:mov|cvta?|add|sub|mul|mad|fma|shl|shr|and|or|xor|not|neg|abs|min|max|setp|selp|ex2|lg2|rcp|div|rem|prmt|lop3|'
    rf'bfe|shf)(?!\S*\.cc)\.[\w.:]+ {REGISTER}(?:, {SOURCE})+'
    rf'|ld\.param[\w.:]* {REGISTER}, \[\w+_param_\d+(?:\+\d+)?\]);'
).fullmatch
LINE = re.compile(  # what a line of a program may be: a brace, a label, a directive, or one instruction
    r'[(){}]+|[$\w]+:|\.[^;]*;?|(?:@!?[%\w]+ )?[a-z][\w.:]*(?: (?:[^;{}]|\{[^{};]*\})*)?;'
).fullmatch


class NotUnderstood(ValueError):
    """A program has something that this module does not know how to compare."""


def compiled(kernel: str, index: int) -> str:
    """A digest of what a case of a kernel is compiled to; this process must dump, and have compiled nothing else.

    Raises:
      NotUnderstood: the programs cannot be told.
    """
    import jax

    from kernels_pallas import cases
    from mixcon_jax.planning import compiling

    device, case = compiling.devices(TARGET)[0], cases.of(kernel)[0][index]

    def graded(arrays: Any, cotangents: Any) -> Any:
        outputs, pull = jax.vjp(lambda arrays: case.kernel(arrays, None), arrays)
        return outputs, pull(cotangents)[0]

    arrays = jax.eval_shape(case.draw)
    with jax.default_device(device):
        if refusal := case.refusal():
            return f'{REFUSED}: {refusal}'
        outputs = jax.eval_shape(lambda arrays: case.kernel(arrays, None), arrays)
    around, count = _around(compiling.lower_for(device, graded, arrays, outputs).as_text())
    compiling.compile_for(device, graded, arrays, outputs)
    programs = _programs(pathlib.Path(os.environ['MOSAIC_GPU_DUMP_TO']))
    if len(programs) != count or not count:
        raise NotUnderstood(f'{kernel} {case.name} calls {count} kernels, and {len(programs)} were dumped')
    return hashlib.sha256('\n'.join([*programs, around]).encode()).hexdigest()[:16]


def _around(text: str) -> tuple[str, int]:
    """The operations that are handed to XLA, in which each kernel is a number, and how many kernels there are."""
    kernels: dict[str, int] = {}
    numbered = lambda found: f'kernel = {kernels.setdefault(found[1], len(kernels))}'
    text = re.sub(rf'kernel_hash = ({STRING}), module = {STRING}', numbered, text)
    if len(re.findall(r'@mosaic_gpu', text)) != len(re.findall(r'\bkernel = \d+', text)):
        raise NotUnderstood('a Mosaic call of another form')
    return text, len(kernels)


def _programs(folder: pathlib.Path) -> list[str]:
    """Each kernel that Mosaic compiled: its PTX and the host's code, without names of files and lines."""
    logs = sorted(folder.glob('*.mlir-passes.log'), key=lambda path: int(re.findall(r'_(\d+)\.', path.name)[-1]))
    return [_module(log.read_text()) for log in logs]


def _module(log: str) -> str:
    found = re.findall(rf'IR Dump Before {LAST}: .*?\n(.*?)(?=\n// -----// IR Dump|\Z)', log, re.DOTALL)
    if len(found) != 1:
        raise NotUnderstood(f'{len(found)} dumps before {LAST}')
    module = re.sub(r'^#loc.*\n', '', found[0], flags=re.MULTILINE)
    module = re.sub(rf' loc\((?:[^()"]|{STRING}|\((?:[^()"]|{STRING})*\))*\)', '', module)
    module = re.sub(rf'mosaic_gpu\.dump_basename = {STRING}', '', module)
    unescaped = lambda text: text.replace(r'\0A', '\n').replace(r'\09', '\t')
    module, programs = re.subn(rf'assembly = ({STRING})', lambda found: _ptx(unescaped(found[1][1:-1])), module)
    if programs != 1:
        raise NotUnderstood(f'{programs} programs in a module')
    return module


def _ptx(text: str) -> str:
    """A program up to the order of instructions that only compute, and the numbers of registers.

    What is left, in its order, are the instructions that do something: branches, barriers, memory, exchanges between
    threads, and writes to a register that has several. In place of any other register stands what it is computed from;
    of a register that has several writes, also which is the last above, and in which block that is read.

    Raises:
      NotUnderstood: a line is more than one instruction, or none that is known.
    """
    text, *sections = re.split(r'^\s*\.section\s+', text, flags=re.MULTILINE)
    if other := [section for section in sections if not section.startswith('.debug')]:
        raise NotUnderstood(f'a section {other[0].split()[0]}')
    lines = [' '.join(line.partition('//')[0].split()) for line in text.splitlines()]
    if strange := [line for line in lines if line and not LINE(line)]:
        raise NotUnderstood(f'the line {strange[0]!r}')
    idle = re.compile(r'(?:\.(?:loc|file)\b.*|\.reg [^;]*;|\$L__(?:tmp|func_begin|func_end)\w*:)?').fullmatch
    lines = [line for line in lines if not idle(line)]
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
            several = {register for register in re.findall(REGISTER, operands) if writes[register] > 1}
            state = [f'{register} {seen[register]} {block}' for register in sorted(several)]
            computed[written[0]] = operation, ' '.join([operands, *state])
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
    operand = re.match(r'(?:@!?[%\w]+ )?[a-z][\w.:]* (\{[^}]*\}|[^,;\[]+)', line)
    return re.findall(REGISTER, operand[1]) if operand else []


# ---------------------------------------------------------------------------------------------------- all kernels
def digests(kernels: list[str], jobs: int) -> dict[str, Any]:
    """`compiled` of every case of these kernels, each in a process of its own, with what it depends on."""
    import jax

    from kernels_pallas import cases

    def one(work: tuple[str, int, Any]) -> str:
        kernel, index, case = work
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {
                'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_COMPILATION_CACHE': 'false', cards.TRUST: '1',
                'MOSAIC_GPU_DUMP_TO': folder, 'MOSAIC_GPU_DUMP_PTX': '1',
            }  # fmt: skip
            command = [sys.executable, '-m', 'tests.gpu.programs', '--case', f'{kernel}:{index}']
            done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f'{kernel} {case.name}: {done.stderr[-2000:]}')
        print(f'{kernel} {case.variant} {case.name}', file=sys.stderr, flush=True)
        return done.stdout.splitlines()[-1]

    work = [(kernel, index, case) for kernel in kernels for index, case in enumerate(cases.of(kernel)[0])]
    found: dict[str, Any] = {kernel: {'sources': {}, 'variants': {}} for kernel in kernels}
    with ThreadPoolExecutor(jobs) as pool:
        for (kernel, _, case), digest in zip(work, pool.map(one, work)):
            found[kernel]['sources'][case.variant] = cards.source_hash(kernel, case.variant)
            found[kernel]['variants'].setdefault(case.variant, {})[case.name] = digest
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
    if card.compute_capability != '.'.join(map(str, TARGETS[now['target']].capability)):
        return card, f'{name}: of compute capability {card.compute_capability}, which is not that of {now["target"]}'
    before_it, sources = (_sources(found, card.variant) for found in (was, is_now))
    if card.sources == sources:
        return card, f'{name}: its sources are as they were'
    if card.sources != before_it:
        return card, f'{name}: not of the sources that were compiled before'
    if (before['jax'], before['target']) != (now['jax'], now['target']):
        return card, f'{name}: compiled by jax {before["jax"]} before and {now["jax"]} now'
    old, new = (found['variants'].get(card.variant, {}) for found in (was, is_now))
    if not old or old.keys() != new.keys():
        return card, f'{name}: other cases than before'
    if refused := [case for case, digest in new.items() if digest.startswith(REFUSED)]:
        return card, f'{name}: {refused[0]} is refused'
    if changed := [case for case in old if old[case] != new[case]]:
        return card, f'{name}: another program for {len(changed)} of {len(old)} cases, the first {changed[0]}'
    ran = card.ran or card.sources
    return dataclasses.replace(card, sources=sources, ran=ran), f'{name}: the same {len(old)} programs'


def _sources(found: dict[str, Any], variant: str) -> str:
    """The hash of a variant's sources; one for all of a kernel's in files of before variants had their own."""
    sources = found['sources']
    return sources if isinstance(sources, str) else sources.get(variant, '')


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--out', type=pathlib.Path, help='write the digests of all programs here')
    what.add_argument('--carry', type=pathlib.Path, help='compare with these, and carry the cards whose are the same')
    what.add_argument('--case', help='what it starts a process for: print the digest of KERNEL:NUMBER')
    parser.add_argument('--jobs', type=int, default=os.cpu_count() or 1, help='processes at once: %(default)s')
    options = parser.parse_args(arguments)
    if options.case:
        kernel, _, index = options.case.partition(':')
        print(compiled(kernel, int(index)))
        return 0
    if options.out:
        options.out.write_text(json.dumps(digests(cards.kernels(), options.jobs), indent=1))
        return 0
    before, stale = json.loads(options.carry.read_text()), 0
    now = digests(cards.kernels(), options.jobs)
    for kernel in cards.kernels():
        found = [carry(before, now, card) for card in cards.shipped(kernel)]
        for card, words in found:
            print(words)
            stale += not card.current
        cards.write(cards.PACKAGE / kernel / cards.FILE, [card for card, _ in found])
    return 1 if stale else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
