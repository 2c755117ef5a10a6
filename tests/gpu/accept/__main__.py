"""Accepts the project on the GPU that is here: kernels, layers, train steps, speed and the quickstart, unattended.

Every stage is a process of its own with a time-out; what one finds is in DIR/results.json when it ends, its output in
DIR/logs, the kernels' cards in DIR/cards. A stage that crashes ends alone and runs once more under compute-sanitizer,
where that is installed. Exits with 1 if a stage went wrong, with 3 if only the time was too short for all.
"""

import argparse
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kernels_pallas import cards, verify
from tests.benchmarks import ladder
from tests.gpu.accept import runner, stages
from tests.gpu.accept.runner import Outcome, Runner, Stage

COMMAND = 'python -m tests.gpu.accept'


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--minutes', type=float, default=8, help='for all stages together: %(default)s')
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/accept'), help='folder: %(default)s')
    parser.add_argument(
        '--only',
        nargs='+',
        metavar='KIND',
        help='stages whose names begin so: kernel, layers, train, run, speed, times, tiles',
    )
    parser.add_argument('--skip', nargs='+', metavar='TEXT', default=(), help='not those that have this in their names')
    parser.add_argument('--jobs', type=int, default=max(1, os.cpu_count() or 1), help='processes at once: %(default)s')
    parser.add_argument('--cpu', action='store_true', help='the same stages on the CPU, tiny: tries the script itself')
    parser.add_argument(
        '--install', type=pathlib.Path, metavar='DIR', help="put DIR's cards beside the kernels, and stop"
    )
    inner = parser.add_argument_group('what it runs itself with, in a process of its own')
    inner.add_argument('--stage')
    inner.add_argument('--findings', type=pathlib.Path)
    options = parser.parse_args(arguments)
    if options.install:
        return install(options.install)
    if options.stage:
        return verify.run_as_process(options.findings, lambda say: stages.perform(options.stage, options.cpu, say))
    if options.jobs < 1 or options.minutes <= 0:
        parser.error('--jobs and --minutes must be above 0')
    known = stages.in_order(options.cpu)
    left_out = lambda name: any(text in name for text in options.skip)
    wanted = {
        kind: [
            s for s in found if (not options.only or s.name.startswith(tuple(options.only))) and not left_out(s.name)
        ]
        for kind, found in known.items()
    }
    if not any(wanted.values()):
        names = sorted({stage.name.split(':')[0] for found in known.values() for stage in found})
        parser.error(f'no stage is left by --only and --skip; there are {", ".join(names)}')
    run = Runner(options.out.resolve(), options.minutes, ['--cpu'] if options.cpu else [])
    run.facts = {'command': shlex.join([*COMMAND.split(), *arguments])}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended, too
    try:
        return accept(run, wanted, options.jobs, options.cpu)
    finally:
        run.kill()


def accept(run: Runner, wanted: Mapping[str, list[Stage]], jobs: int, cpu: bool) -> int:
    """Runs the stages in order; returns the exit code."""
    os.environ |= _environment(run.folder, cpu)
    device = run.run(Stage('device', 90))
    if device.state == runner.SKIPPED:
        print('error: --minutes leaves no time for any stage', file=sys.stderr)
        return 2
    if device.state != runner.PASSED:
        print('\n'.join(device.last_lines), file=sys.stderr)
        print('error: JAX does not start on a GPU here; --cpu tries the script on the CPU', file=sys.stderr)
        return 1
    facts = device.findings[0]
    run.facts['facts'] = facts
    print(', '.join(f'{key} {value}' for key, value in facts.items()), flush=True)

    # Kernels first: their cards decide what all that follows runs by default.
    kernels = run.together(wanted['kernels'], jobs)
    if not cpu:
        write_cards(run, kernels, facts)
    begun = run.begin([*wanted['times'], *wanted['ladder'], *wanted['tiles']])
    run.together([*wanted['training'], *wanted['layers']], jobs)
    # From here on one process at a time, as they are timed.
    for outcome in run.release(begun):
        add_times(run, outcome, facts['device'])
    return conclude(run)


def _environment(folder: pathlib.Path, cpu: bool) -> dict[str, str]:
    """Of the stages: the cards that this run makes, memory as it is needed, and where a process crashed."""
    return {
        'JAX_PLATFORMS': 'cpu' if cpu else 'cuda,cpu',
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
        'PYTHONFAULTHANDLER': '1',
        'PYTHONUNBUFFERED': '1',
        'PYTHONWARNINGS': 'default::UserWarning',
        cards.FOLDER: str(folder / 'cards'),
    }


def write_cards(run: Runner, kernels: list[Outcome], facts: dict[str, Any]) -> None:
    """Puts what the kernels' stages found into cards, a file a kernel; of a variant only if all its stages ran."""
    grouped: dict[verify.Part, list[Outcome]] = {}
    for outcome in kernels:
        _, kernel, variant, _ = outcome.name.split(':')
        grouped.setdefault(verify.Part(kernel, variant), []).append(outcome)
    for part, outcomes in grouped.items():
        processes = int(outcomes[0].name.rpartition('/')[2])
        if len(outcomes) < processes or any(outcome.state == runner.SKIPPED for outcome in outcomes):
            continue
        findings = [found for outcome in outcomes for found in outcome.findings]
        bad = [outcome for outcome in outcomes if outcome.state in (runner.CRASHED, runner.TIMED_OUT)]
        ended = f'{bad[0].why or bad[0].state} after {bad[0].seconds:.0f} s' if bad else ''
        if made := verify.card(part, findings, ended, COMMAND, facts):
            cards.write(run.folder / 'cards' / f'{part.kernel}.json', [made])


def add_times(run: Runner, outcome: Outcome, device: str) -> None:
    """Puts a kernel's times onto this GPU's cards of this folder."""
    kind, _, kernel = outcome.name.partition(':')
    path = run.folder / 'cards' / f'{kernel}.json'
    if kind == 'times' and outcome.findings:
        cards.write(path, verify.with_times(cards.read(path), outcome.findings, device))


def conclude(run: Runner) -> int:
    """Prints the table and says what it comes to."""
    print(f'\n{runner.table(run.outcomes, described)}')
    wrong = [o.name for o in run.outcomes if o.state not in (runner.PASSED, runner.SKIPPED)]
    short = [o.name for o in run.outcomes if o.state == runner.SKIPPED]
    print(f'\n{len(run.outcomes) - len(wrong) - len(short)} passed; all figures are in {run.folder / "results.json"}')
    if short:
        print(f'not run, the time was over: {", ".join(short)}')
    if wrong:
        print(f'error: {len(wrong)} went wrong: {", ".join(wrong)}', file=sys.stderr)
    return 1 if wrong else 3 if short else 0


def described(outcome: Outcome) -> str:
    """What a stage found, in a few words."""
    if outcome.state != runner.PASSED:
        return '; '.join(runner.reasons(outcome))[:160]
    if outcome.name.startswith('speed:'):
        return ladder.line(outcome.findings[-1]['rung'], outcome.findings[-1])
    errors = [max(found['errors'].values()) for found in outcome.findings if found.get('errors')]
    errors += [found['error'] for found in outcome.findings if 'error' in found]
    if errors:
        return f'{len(errors)} cases, errors to {max(errors):.1e}'
    if outcome.name.startswith('times:'):
        times = [f'{f["timed"]}: {verify.described(f["times"])}' for f in outcome.findings if 'timed' in f]
        return '; '.join(times)
    return '; '.join(f'{k} {v}' for found in outcome.findings[-1:] for k, v in found.items())[:160]


def install(folder: pathlib.Path) -> int:
    """Puts a run's cards beside the kernels' sources, those of other sources not."""
    found = {kernel: cards.read(folder / 'cards' / f'{kernel}.json') for kernel in cards.kernels()}
    if not any(found.values()):
        print(f'error: there are no cards in {folder / "cards"}', file=sys.stderr)
        return 2
    stale = [f'{kernel} {card.variant}' for kernel, made in found.items() for card in made if not card.current]
    for kernel, made in found.items():
        if fresh := [card for card in made if card.current]:
            cards.write(cards.PACKAGE / kernel / cards.FILE, fresh)
            print(f'{kernel}: {", ".join(f"{card.variant} {card.outcome}" for card in fresh)}')
    if stale:
        print(f'error: these have changed since and are not installed: {", ".join(stale)}', file=sys.stderr)
    return 1 if stale else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
