"""Runs the cases of an experiment's ``sweep()``, several at a time, each as a ``mixcon train`` of its own.

    python -m launch.sweep --config experiments/ablations/attention_conba_ratio.py --workdir runs/ratio --jobs 2

A case runs in ``WORKDIR/<name>/seed-<seed>``; what it prints goes to ``WORKDIR/<name>/seed-<seed>.log``. The same
command goes on: cases that are done are passed over, interrupted ones continue, failed ones are tried again.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from launch import processes
from launch.processes import Child, Share, Signals
from launch.sweep.cases import Case, cases, require_unchanged
from launch.sweep.estimate import Estimate, Sizes, makespan, product_flops
from launch.sweep.status import NEW, REFUSED, TimedRun, measure, status_of, tokens_per_step
from mixcon_jax.cli import OVERRIDES, Parser, parse_overrides, require_numbers
from mixcon_jax.errors import Exit, UserError
from mixcon_jax.host.ending import exit_with
from mixcon_jax.host.output import LiveLine, go_on, use_utf8
from mixcon_jax.host.signals import STOPPING
from mixcon_jax.parsing import number
from mixcon_jax.runs import mark
from mixcon_jax.runs.run import DONE, Run
from mixcon_jax.runs.workdir import explained, take_lock
from mixcon_jax.units import columns, duration, short

PROGRAM = 'python -m launch.sweep'
DESCRIPTION = (
    "Run every case of an experiment's sweep(), each as a process of its own. The same command goes on: cases that are"
    ' done are passed over, interrupted ones continue, failed ones are tried again.'
)
EPILOG = (
    'A case runs in WORKDIR/<name>/seed-<seed>; what it prints goes to WORKDIR/<name>/seed-<seed>.log.'
    f' {OVERRIDES} Overrides hold for all cases, but for what a case sets itself.'
    f' Exit codes: {Exit.DONE} all done, {Exit.FAILED} some failed, {Exit.USER_ERROR} bad input, {Exit.STOPPED} stopped'
    f' and saved, {Exit.INTERRUPTED} interrupted before a case ran, or the cases killed by a second Ctrl-C.'
)
LOOK = 0.5  # seconds between looks at the running cases' steps


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, or lists, the cases of a sweep."""
    if argv is None:
        use_utf8()
    exit_with(lambda: _main(*build_parser().parse_known_args(argv)))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(PROGRAM, description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument('--config', required=True, metavar='FILE[:ARG]', help='experiment file with sweep()')
    parser.add_argument('--workdir', required=True, help="folder of the sweep; every case's run lies below it")
    parser.add_argument(
        '--jobs', type=int, default=1, help='cases at a time, with equal shares of cores and GPUs (default: 1)'
    )
    parser.add_argument('--list', action='store_true', help='show cases, sizes and time left; run nothing')
    return parser


def _main(known: argparse.Namespace, rest: Sequence[str]) -> int:
    overrides = parse_overrides(rest, PROGRAM)
    require_numbers(known)
    go_on()
    environment = dict(os.environ)  # of the cases
    shares = processes.shares(known.jobs, '--jobs', environment)
    workdir = mark.path_of(known.workdir)
    if mark.is_run(workdir):
        raise UserError(f'{workdir} is the folder of a single run; give the sweep one of its own')
    os.environ['JAX_PLATFORMS'] = 'cpu'  # this process only counts parameters: devices are for the cases
    wanted = cases(known.config, overrides)
    if known.list:
        print(listing(wanted, workdir, shares, environment))
        return Exit.DONE
    with explained(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    with Signals() as signals:
        return Sweep(wanted, workdir, shares, environment, signals).run()


def listing(wanted: Sequence[Case], workdir: Path, shares: Sequence[Share], environment: Mapping[str, str]) -> str:
    """The table of --list: each case's state, size and estimated time."""
    sizes = Sizes()
    estimate = Estimate(wanted, workdir, sizes, lambda: product_flops(shares[0], environment))
    statuses = [status_of(case, workdir) for case in wanted]
    counts = [sizes.parameters(case) for case in wanted]
    tokens = [case.config.train.steps * tokens_per_step(case.config) for case in wanted]
    left = [
        0.0 if status.state in (DONE, REFUSED) else estimate.seconds(case, status.steps - status.step)
        for case, status in zip(wanted, statuses)
    ]
    known = [seconds for seconds in left if seconds is not None]
    whole = makespan([seconds for seconds in known if seconds], len(shares)) if len(known) == len(left) else None

    header = ['case', 'state', 'parameters', 'active', 'tokens', 'time left']
    rows = [
        [case.folder, str(status), f'{count.total:,}', f'{count.active:,}', short(number), _time(seconds)]
        for case, status, count, number, seconds in zip(wanted, statuses, counts, tokens, left)
    ]
    done = sum(status.state == DONE for status in statuses)
    rows.append([f'{len(wanted)} cases', f'{done} done', '', '', short(sum(tokens)), _time(whole)])
    if all(count.active == count.total for count in counts):
        for row in (header, *rows):
            del row[3]
    lines = [columns([header, *rows], left=2)]
    if estimate.basis and any(left):
        jobs = f'{len(shares)} cases at a time' if len(shares) > 1 else 'one case at a time'
        lines.append(f'Time left is rough, without start-up and compilation: from {estimate.basis}; {jobs}.')
    lines += [f'{case.folder}: {status.error}' for case, status in zip(wanted, statuses) if status.error]
    return '\n'.join(lines)


def _time(seconds: float | None) -> str:
    return '?' if seconds is None else duration(seconds) if seconds else '-'


# ----- running ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """A case that is running.

    Attributes:
      run: what it has recorded.
      began: by ``time.monotonic()``.
      offset: where in the case's log the output of this start begins.
    """

    case: Case
    child: Child
    share: Share
    run: Run
    began: float
    offset: int

    def step(self) -> int:
        """Steps that it has made; as far as they could be read, of a file that cannot be."""
        with contextlib.suppress(UserError):
            self.run.update()
        return self.run.step


class Sweep:
    """Runs cases until all have ended or a signal comes.

    Args:
      cases: in the order of their starts.
      workdir: the sweep's folder.
      shares: of the machine, one for each case that may run at a time.
      environment: of the cases.
      signals: that came.
      stream: where progress is shown.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        workdir: Path,
        shares: Sequence[Share],
        environment: Mapping[str, str],
        signals: Signals,
        stream: TextIO | None = None,
    ) -> None:
        self._cases, self._workdir, self._environment = cases, workdir, environment
        self._waiting, self._free, self._jobs = list(cases), list(shares), len(shares)
        self._signals, self._screen = signals, LiveLine(stream or sys.stdout)
        self._estimate = Estimate(cases, workdir, Sizes())
        self._running: list[Job] = []
        self._ended: dict[str, str] = {}  # how cases have ended, by folder
        self._errors: dict[str, list[str]] = {}  # of those that failed: lines, the last of which says most

    def run(self) -> int:
        """Returns the exit code: of all done, some failed, some stopped and saved, or killed by a second Ctrl-C."""
        self._greet()
        stopping, looked = False, 0.0
        try:
            while self._running or (self._waiting and not self._signals.stop):
                while self._waiting and self._free and not self._signals.stop:
                    self._start(self._waiting.pop(0))
                for job in [job for job in self._running if job.child.poll() is not None]:
                    self._conclude(job)
                if self._signals.stop and not stopping:
                    stopping = True
                    self._stop()
                if self._signals.kill:
                    processes.kill([job.child for job in self._running])
                if time.monotonic() - looked >= LOOK:
                    looked = time.monotonic()
                    made = (f'{job.case.folder} {job.step()}/{job.case.config.train.steps}' for job in self._running)
                    columns = shutil.get_terminal_size().columns
                    self._screen.live(' · '.join(made)[: columns - 1])  # a wrapped line could not be taken back
                time.sleep(processes.POLL)
        finally:
            processes.end([job.child for job in self._running])
        self._report()
        if self._signals.kill:
            return Exit.INTERRUPTED
        if self._errors and self._done() + len(self._errors) == len(self._cases):
            return Exit.FAILED
        return Exit.DONE if self._done() == len(self._cases) else Exit.STOPPED

    # ----- one case -----

    def _start(self, case: Case) -> None:
        status = status_of(case, self._workdir)  # only now: another sweep may have run it meanwhile
        if status.state == DONE:
            self._ended[case.folder] = 'done before'
        elif status.state == REFUSED:
            self._fail(case, [status.error])
        else:
            try:
                job = self._spawn(case)
            except UserError as error:
                self._fail(case, [str(error)])
                return
            self._running.append(job)
            begins = f'goes on after step {status.step} of {status.steps}' if status.step else 'starts'
            self._screen.say(f'{case.folder} {begins} ({self._cases.index(case) + 1} of {len(self._cases)})')

    def _spawn(self, case: Case) -> Job:
        require_unchanged(case)
        options = ['--config', case.path, '--workdir', str(self._workdir / case.folder)]
        options += [f'--config.{override}' for override in case.overrides]
        log = self._log(case)
        with explained(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, 'ab') as file:
                # The child inherits the lock with the file: it holds as long as the child writes.
                if not take_lock(file):
                    raise UserError(f'another sweep is running it in {self._workdir}; wait for it, or stop it')
                file.write(os.fsencode(f'$ mixcon train {shlex.join(options)}\n'))
                file.flush()
                offset = file.tell()
                child = processes.start('launch.child', ['train', *options], self._free[-1], self._environment, file)
        return Job(case, child, self._free.pop(), Run(self._workdir / case.folder), time.monotonic(), offset)

    def _conclude(self, job: Job) -> None:
        """Takes note of how a case ended."""
        self._running.remove(job)
        self._free.append(job.share)
        case, code, took = job.case, job.child.returncode, duration(time.monotonic() - job.began)
        status = status_of(case, self._workdir)
        if code == Exit.DONE and status.state == DONE:
            self._ended[case.folder] = 'done'
            name, value = measure(status.scores)
            scores = f'loss {number(status.scores["loss"]):.4f} · {value:.4f} {name}'
            counted = f'{self._done()} of {len(self._cases)} done{self._left(case)}'
            self._screen.say(f'{case.folder} done in {took} · {scores} · {counted}')
        elif code == Exit.STOPPED or -code in STOPPING or (self._signals.kill and code < 0):
            self._ended[case.folder] = f'stopped {status}' if status.step else 'stopped'
            saved = f'saved {status}' if status.step else 'before its first checkpoint'
            self._screen.say(f'{case.folder} stopped after {took}, {saved}')
        else:
            other = [status.error] if code == Exit.DONE and status.state == REFUSED else None
            self._fail(case, other or _why(self._log(case), job.offset, code), f' after {took}')

    def _fail(self, case: Case, error: list[str], after: str = '') -> None:
        self._ended[case.folder], self._errors[case.folder] = 'failed', error
        self._screen.say(f'{case.folder} failed{after}: {error[-1]}')

    def _log(self, case: Case) -> Path:
        """Beside the case's folder, which is there only once it has something to keep."""
        folder = self._workdir / case.folder
        return folder.with_name(f'{folder.name}.log')

    # ----- all cases -----

    def _greet(self) -> None:
        done = sum(status_of(case, self._workdir).state == DONE for case in self._cases)
        jobs = f', {self._jobs} at a time' if self._jobs > 1 else ''
        self._screen.say(f'{len(self._cases)} cases, {done} of them done{jobs}; Ctrl-C saves and stops')

    def _done(self) -> int:
        return sum(how.startswith('done') for how in self._ended.values())

    def _stop(self) -> None:
        for job in self._running:
            job.child.terminate()
        if self._running:
            number = len(self._running)
            self._screen.say(f'stopping: {number} running {_plural("case", number)} will save; Ctrl-C again kills')

    def _left(self, ended: Case) -> str:
        """How long the rest takes after the end of a case, if anything tells."""
        self._estimate.look([ended, *(job.case for job in self._running)])  # the others' speeds are as they were
        steps = [(job.case, job.case.config.train.steps - job.step()) for job in self._running]
        for case in self._waiting:
            status = status_of(case, self._workdir)
            if status.state not in (DONE, REFUSED):
                steps.append((case, status.steps - status.step))
        seconds = [self._estimate.seconds(case, left) for case, left in steps]
        if not seconds or None in seconds:
            return ''
        return f' · {duration(makespan(filter(None, seconds), self._jobs))} left'

    def _report(self) -> None:
        """The table of all cases, and what went wrong."""
        rows, measures = [], set()
        for case in self._cases:
            status = status_of(case, self._workdir)
            row = [case.folder, self._ended.get(case.folder, str(status)), '', '', '']
            if status.state == DONE:
                name, value = measure(status.scores)
                measures.add(name)
                row[2:4] = f'{number(status.scores["loss"]):.4f}', f'{value:.4f}'
            if status.state not in (NEW, REFUSED):
                run = TimedRun(self._workdir / case.folder)
                with contextlib.suppress(UserError):
                    run.update()
                speed = run.steps_speed()
                row[4] = short(speed) if speed else ''
            rows.append(row)
        self._screen.say(
            '\n' + columns([['case', 'state', 'loss', ' or '.join(sorted(measures)), 'tokens/s'], *rows], left=2)
        )
        for case in self._cases:
            if case.folder in self._errors:
                self._screen.say('\n'.join([f'\n{case.folder} failed:', *self._errors[case.folder]]))
                self._screen.say(f'(its output: {self._log(case)})')
        if self._done() < len(self._cases):
            self._screen.say('\nthe same command goes on with the rest')


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f'{word}s'


def _why(log: Path, offset: int, code: int) -> list[str]:
    """Why a case failed: its own line about it, else the end of what it printed."""
    lines = processes.last_lines(log, 10, offset)
    ours = [line.removeprefix('error: ') for line in lines if line.startswith('error: ')]
    if ours and code >= 0:
        return ours[-1:]
    return [*lines[:-1], f'{lines[-1]} ({processes.how_it_ended(code)})' if lines else processes.how_it_ended(code)]
