"""Verifies the GPU kernels on the GPU that is here: `python -m kernels_pallas.verify`; it needs JAX and jaxtyping.

Outputs and gradients of every case are compared with float64, and must be the same bits twice. What is right becomes a
card of this machine (kernels_pallas/cards.py), and from then on the kernel runs by default. A process a variant: a
kernel that goes wrong takes only its own process along.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jaxlib

from kernels_pallas import cards, cases, platform
from kernels_pallas.cards import Card

SECONDS = 600  # of a process
WRONG, BROKE_OFF = 1, 70  # exit codes of a process whose numbers were wrong, and of one that an exception ended


@dataclasses.dataclass(frozen=True)
class Part:
    """What one process does: the cases of a variant, or the times of a kernel."""

    kernel: str
    variant: str  # '' for the times

    def __str__(self) -> str:
        return f'{self.kernel} {self.variant or "times"}'

    def command(self, out: pathlib.Path) -> list[str]:
        """A process that appends its findings to a file, a line of JSON each."""
        what = ['--variant', self.variant] if self.variant else ['--times']
        return [sys.executable, '-m', 'kernels_pallas.verify', self.kernel, *what, '--findings', str(out)]


def parts(kernels: Iterable[str]) -> list[Part]:
    """A part for every variant of these kernels, those with most cases first."""
    counted: dict[Part, int] = {}
    for kernel in kernels:
        for case in cases.of(kernel)[0]:
            part = Part(kernel, case.variant)
            counted[part] = counted.get(part, 0) + 1
    return sorted(counted, key=lambda part: -counted[part])


def chosen(part: Part, small: bool = False) -> list[cases.Case]:
    """The cases of a variant, or those of them that are small enough for the interpreter."""
    return [case for case in cases.of(part.kernel)[0] if case.variant == part.variant and (case.small or not small)]


def refusal(part: Part) -> str | None:
    """Why no case of a variant is for the GPU that is here, or None."""
    reasons = [case.refusal() for case in chosen(part)]
    return reasons[0] if all(reasons) else None


# -------------------------------------------------------------------------------------------- in a part's own process
def run_part(
    part: Part,
    say: Callable[[dict[str, Any]], None],
    interpret: Any = None,
    share: tuple[int, int] = (0, 1),
    ready: Callable[[], None] = lambda: None,
) -> bool:
    """Runs a part, or the i-th of n shares of its cases; `say` gets every finding. Returns whether all was right.

    What is timed is compiled first; `ready` is called in between.

    Raises:
      Exception: whatever a case raised, of which nothing after it is to be trusted: a kernel that goes wrong leaves the
        process without a GPU.
    """
    say({'sources': cards.source_hash(part.kernel, part.variant)})
    if not part.variant:
        timed = [(one, cases.compiled(one)) for one in cases.of(part.kernel)[1]]
        ready()
        ceilings = cases.ceilings()
        say({'copy_bytes_per_second': ceilings[0], 'exponentials_per_second': ceilings[1]})
        for one, calls in timed:
            say({'timed': one.name, 'variant': one.variant, 'times': cases.measure(one, calls, *ceilings)})
        return True
    good = True
    for case in chosen(part, small=interpret is not None)[share[0] :: share[1]]:
        start = time.perf_counter()
        reason = case.refusal() if interpret is None else None
        try:
            found: dict[str, Any] = {'refused': reason} if reason else {'errors': cases.check(case, interpret)}
        except cases.Mismatch as error:
            good = False
            found = {'failed': f'{case.name}: {error}', 'errors': error.errors}
        except Exception as error:
            say({'case': case.name, 'crashed': f'{type(error).__name__}: {str(error).strip()}'[:2000]})
            raise
        say({'case': case.name, 'seconds': round(time.perf_counter() - start, 1)} | found)
    return good


# ------------------------------------------------------------------------------------------------------- in the parent
def card(part: Part, findings: Sequence[dict], ended: str, command: str, device: dict[str, str]) -> Card | None:
    """The card of a variant, or None where nothing was shown of it, neither good nor bad.

    Args:
      part: which variant.
      findings: of all its processes.
      ended: how one of them ended that did not come to its end, in a few words; '' if all did.
      command: what is run.
      device: of `device_facts`.
    """
    crashed = [f'{f["case"]}: {f["crashed"]}' for f in findings if 'crashed' in f]
    failed = [f['failed'] for f in findings if 'failed' in f]
    hashes = {f['sources'] for f in findings if 'sources' in f}
    done = {f['case'] for f in findings if 'errors' in f or 'refused' in f}
    if any('RESOURCE_EXHAUSTED' in text or 'out of memory' in text for text in (*crashed, ended)):
        return None
    if len(hashes) != 1 or all('refused' in f for f in findings if 'case' in f):
        return None
    if crashed or ended:
        outcome = f'crashes: {(crashed or [ended])[0]}'
    elif failed:
        outcome = f'fails: {failed[0]}'
    elif all(case.name in done for case in chosen(part)):
        outcome = cards.VERIFIED
    else:
        return None
    worst = {f['case']: max(f['errors'].values()) for f in findings if f.get('errors')}
    return Card(
        kernel=part.kernel,
        variant=part.variant,
        outcome=outcome[:300],
        device=device['device'],
        compute_capability=device['compute_capability'],
        driver=device['driver'],
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        date=datetime.date.today().isoformat(),
        sources=hashes.pop(),
        command=command,
        cases={name: float(f'{value:.2g}') for name, value in worst.items()},
    )


def with_times(made: Iterable[Card], findings: Iterable[dict], device: str) -> list[Card]:
    """Those of the cards that are of this GPU and of the running sources, with the times of their variants."""
    times: dict[str, dict] = {}
    for found in findings:
        if 'timed' in found:
            times.setdefault(found['variant'], {})[found['timed']] = found['times']
    mine = (card for card in made if card.device == device and card.current)
    return [dataclasses.replace(card, times=times.get(card.variant, card.times)) for card in mine]


def device_facts() -> dict[str, str]:
    """What a card says of the GPU."""
    device = platform.device()
    return {
        'device': device.device_kind,
        'compute_capability': str(device.compute_capability),
        'driver': driver(),
    }


def driver() -> str:
    """The version of NVIDIA's driver, or ''."""
    if not shutil.which('nvidia-smi'):
        return ''
    query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ''
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else ''


def read_findings(path: pathlib.Path) -> list[dict]:
    """What a process has written so far; a last line that is torn is left out."""
    found = []
    for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def last_words(lines: Sequence[str]) -> str:
    """The line that says most of why a process ended: not always its last."""
    telling = re.compile(
        r'CUDA_ERROR|Fatal Python error|RESOURCE_EXHAUSTED|^F\d{4} |^[\w.]+(Error|Exception|Mismatch)\b'
    )
    lines = [line.strip() for line in lines if line.strip()]
    return next((line for line in reversed(lines) if telling.search(line)), lines[-1] if lines else '')[:300]


def verify(kernels: Sequence[str], folder: pathlib.Path, jobs: int, times: bool) -> bool:
    """Runs every part of these kernels, writes the cards into a folder, and prints a table; whether all is right."""
    facts, wanted = device_facts(), []
    print(f'{facts["device"]}, compute capability {facts["compute_capability"]}, driver {facts["driver"] or "unknown"}')
    for part in parts(kernels):
        if reason := refusal(part):
            print(f'{part.kernel:16} {part.variant:10} is not for this GPU: {reason}')
        else:
            wanted.append(part)
    print('a variant takes one to three minutes, most of it compiling', flush=True)
    good = True
    with tempfile.TemporaryDirectory() as temporary:

        def run(part: Part) -> tuple[Part, list[dict], str]:
            """A part's process: its findings, and how it ended if not well."""
            out = pathlib.Path(temporary, str(part).replace(' ', '-'))
            settings = os.environ | {'PYTHONFAULTHANDLER': '1'}
            try:
                done = subprocess.run(part.command(out), env=settings, capture_output=True, text=True, timeout=SECONDS)
            except subprocess.TimeoutExpired:
                return part, read_findings(out), f'no end after {SECONDS} s'
            if done.returncode in (0, WRONG):
                return part, read_findings(out), ''
            words = last_words(done.stderr.splitlines())
            return part, read_findings(out), f'exit code {done.returncode}: {words}'

        with ThreadPoolExecutor(max_workers=jobs) as pool:
            for part, findings, ended in pool.map(run, wanted):
                made = card(part, findings, ended, cards.COMMAND, facts)
                good = good and made is not None and made.outcome == cards.VERIFIED
                if made is None:
                    print(f'{part.kernel:16} {part.variant:10} was not shown, good or bad: {ended}', flush=True)
                    continue
                cards.write(folder / f'{part.kernel}.json', [made])
                print(line(made), flush=True)
        for kernel in dict.fromkeys(part.kernel for part in wanted) if times else ():
            # One after the other: a second process would be timed along.
            _, findings, ended = run(Part(kernel, ''))
            path = folder / f'{kernel}.json'
            cards.write(path, with_times(cards.read(path), findings, facts['device']))
            for found in findings:
                if 'timed' in found:
                    print(f'{kernel:16} {found["timed"]:40} {described(found["times"])}', flush=True)
            if ended:
                good = False
                print(f'{kernel:16} could not be timed: {ended}')
    print(f'cards are in {folder}')
    return good


def line(card: Card) -> str:
    """A card in one line."""
    worst = f'{len(card.cases)} cases, errors to {max(card.cases.values()):.1e}' if card.cases else 'no case ended'
    return f'{card.kernel:16} {card.variant:10} {card.outcome}; {worst}'


def described(times: dict[str, float]) -> str:
    """Times in words: milliseconds, and how often the floor."""
    text = []
    for name in ('forward', 'both'):
        text.append(f'{name} {times[name]:.3f} ms ({times[name] / times[f"{name}_floor"]:.2f} of the floor')
        text[-1] += f', XLA {times[f"xla_{name}"]:.3f})' if f'xla_{name}' in times else ')'
    return ', '.join(text)


def default_jobs() -> int:
    """Processes at once: compiling is most of the work, and each takes some of the GPU's memory."""
    return max(1, min(8, (os.cpu_count() or 2) // 2))


def standing() -> list[tuple[Part, list[Card]]]:
    """Every variant of every kernel, with the cards that are shipped of it."""
    return [
        (part, [card for card in cards.shipped(part.kernel) if card.variant == part.variant])
        for part in sorted(parts(cards.kernels()), key=str)
    ]


# -------------------------------------------------------------------------------------------------------- command line
def build_parser() -> argparse.ArgumentParser:
    known = ', '.join(cards.kernels())
    parser = argparse.ArgumentParser(
        prog=cards.COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('kernels', nargs='*', metavar='KERNEL', help=f'all by default: {known}')
    parser.add_argument('--jobs', type=int, default=default_jobs(), help='processes at once: %(default)s')
    parser.add_argument('--out', type=pathlib.Path, help="folder of the cards (default: this machine's)")
    parser.add_argument('--no-times', action='store_true', help='compare only')
    inner = parser.add_argument_group('what the command runs itself with, in a process of its own')
    inner.add_argument('--variant', help='the cases of one variant')
    inner.add_argument('--times', action='store_true', help='the times of one kernel')
    inner.add_argument('--findings', type=pathlib.Path, help='file that findings are appended to')
    return parser


def main(arguments: Sequence[str]) -> int:
    options = build_parser().parse_args(arguments)
    if unknown := sorted(set(options.kernels) - set(cards.kernels())):
        return _refuse(f'no kernel {unknown[0]!r}; there are {", ".join(cards.kernels())}')
    if options.jobs < 1:
        return _refuse(f'--jobs {options.jobs} must be at least 1')
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # before JAX takes the GPU
    if platform.platform() != 'gpu':
        return _refuse(f'JAX sees no NVIDIA GPU here, only {platform.platform()}')
    if options.findings:
        part = Part(options.kernels[0], options.variant or '')
        return run_as_process(options.findings, lambda say: run_part(part, say))
    folder = options.out or cards.local_folder()
    if folder is None:
        return _refuse('this user has no home; name a folder for the cards with --out')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return _refuse(f'the cards cannot be written to {folder}: {error.strerror}; name another folder with --out')
    return 0 if verify(options.kernels or cards.kernels(), folder, options.jobs, not options.no_times) else 1


def run_as_process(path: pathlib.Path, run: Callable[[Callable[[dict], None]], bool]) -> int:
    """Runs `run(say)`, whose findings go to a file, a line of JSON each; returns the process's exit code."""
    with path.open('a', encoding='utf-8') as file:
        try:
            return 0 if run(lambda found: print(json.dumps(found), file=file, flush=True)) else WRONG
        except Exception:
            traceback.print_exc()
            return BROKE_OFF


def _refuse(reason: str) -> int:
    print(f'error: {reason}', file=sys.stderr)
    return 2


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
