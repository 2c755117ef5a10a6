"""Runs stages, a process each: side by side or alone, with time-outs, and what became of each in a file at once."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kernels_pallas.verify import WRONG, last_words, read_findings

PASSED, FAILED, CRASHED, TIMED_OUT, SKIPPED = 'passed', 'failed', 'crashed', 'timed out', 'did not fit the time'
LEAST = 15  # seconds that a stage is started with
TIMED = 12  # seconds that a stage takes once it is let go on
SANITIZER = 'compute-sanitizer'


@dataclasses.dataclass(frozen=True)
class Stage:
    """One process: `python -m tests.gpu.accept --stage NAME`.

    Attributes:
      name: of the stage; what stands before the first colon says what it does.
      seconds: time-out.
    """

    name: str
    seconds: float


@dataclasses.dataclass
class Outcome:
    """What became of a stage."""

    name: str
    state: str
    exit_code: int | None = None
    seconds: float = 0.0
    findings: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    last_lines: list[str] = dataclasses.field(default_factory=list)
    why: str = ''
    sanitizer: list[str] = dataclasses.field(default_factory=list)


class Runner:
    """Starts stages until the time is over; `outcomes` grows, and is written to `results.json` after each.

    Args:
      folder: of results and logs.
      minutes: for all stages together.
      arguments: that every stage's process gets.
    """

    def __init__(self, folder: pathlib.Path, minutes: float, arguments: Sequence[str]) -> None:
        self.folder, self._arguments = folder, list(arguments)
        self.end = time.monotonic() + 60 * minutes
        self.outcomes: list[Outcome] = []
        self._running: set[_Process] = set()
        self.facts: dict[str, Any] = {}
        self._lock = threading.Lock()
        (folder / 'logs').mkdir(parents=True, exist_ok=True)
        (folder / 'findings').mkdir(exist_ok=True)

    def together(self, stages: Iterable[Stage], jobs: int) -> list[Outcome]:
        """Runs stages side by side, at most so many at once."""
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            return list(pool.map(self.run, stages))

    def run(self, stage: Stage) -> Outcome:
        """Runs one stage to its end; one that crashes runs once more under compute-sanitizer, if that is there."""
        process = self._start(stage)
        return self._finish(process) if process else self.note(Outcome(stage.name, SKIPPED))

    def begin(self, stages: Iterable[Stage]) -> 'list[tuple[Stage, _Process | None]]':
        """Starts gated stages, which compile side by side and beside whatever else runs, and then wait."""
        return [(stage, self._start(stage)) for stage in stages]

    def release(self, begun: 'Sequence[tuple[Stage, _Process | None]]') -> list[Outcome]:
        """Once they have compiled, lets one after the other go on: nothing else runs while it is timed.

        Those that still compile when the rest needs the time that is left are ended, so that one slow compilation does
        not keep all others from being timed.
        """
        waiting = lambda: [process for _, process in begun if process and not process.ready()]
        ready = lambda: sum(bool(process and process.compiled()) for _, process in begun)
        while waiting() and self.left() > TIMED * (ready() + 1):
            time.sleep(0.1)
        late = {id(process) for _, process in begun if process and process.running() and not process.compiled()}
        for _, process in begun:
            if process and id(process) in late:
                process.kill()
        found = []
        for stage, process in begun:
            if process is None or id(process) in late:
                self._running.discard(process)
                found.append(self.note(Outcome(stage.name, SKIPPED)))
                continue
            if process.compiled():
                process.extend(min(stage.seconds, self.left()))  # what it waited for the others does not count
            found.append(self._finish(process))
        return found

    def kill(self) -> None:
        """Ends what still runs, and what that has started."""
        for process in list(self._running):
            process.kill()

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def note(self, outcome: Outcome) -> Outcome:
        """Keeps an outcome, in memory and on the disk, and says it."""
        with self._lock:
            self.outcomes.append(outcome)
            self.save()
            print(line(outcome), flush=True)
        return outcome

    def save(self) -> None:
        path = self.folder / 'results.json'
        text = json.dumps(self.facts | {'stages': [dataclasses.asdict(o) for o in self.outcomes]}, indent=1)
        path.with_suffix('.tmp').write_text(text)
        os.replace(path.with_suffix('.tmp'), path)

    def _start(self, stage: Stage, wrapper: Sequence[str] = (), suffix: str = '') -> '_Process | None':
        seconds = min(stage.seconds, self.left())
        if seconds < LEAST:
            return None
        name = stage.name.replace(':', '-').replace('/', '-').replace(' ', '_').replace(',', '') + suffix
        findings, log = self.folder / 'findings' / f'{name}.jsonl', self.folder / 'logs' / f'{name}.txt'
        findings.unlink(missing_ok=True)
        command = [*wrapper, sys.executable, '-m', 'tests.gpu.accept', '--stage', stage.name]
        process = _Process(stage, [*command, '--findings', str(findings), *self._arguments], findings, log, seconds)
        self._running.add(process)
        return process

    def _finish(self, process: '_Process') -> Outcome:
        code = process.finish()
        self._running.discard(process)
        state = {0: PASSED, WRONG: FAILED, None: TIMED_OUT}.get(code, CRASHED)
        if code is None and self.left() < 1:
            state = SKIPPED  # the end of all stages came before its own
        findings, lines = read_findings(process.findings), process.last_lines()
        outcome = Outcome(process.stage.name, state, code, round(process.seconds(), 1), findings, lines)
        if state == CRASHED:
            outcome.why = last_words(process.last_lines(200))
            if shutil.which(SANITIZER):
                outcome.sanitizer = self._sanitized(process.stage)
        return self.note(outcome)

    def _sanitized(self, stage: Stage) -> list[str]:
        """What compute-sanitizer says of a stage that crashed."""
        again = self._start(dataclasses.replace(stage, seconds=240), _SANITIZE, '-sanitizer')
        if again is None:
            return []
        again.finish()
        self._running.discard(again)
        return [text for text in again.last_lines(4000) if text.startswith('=====')][:60]


_SANITIZE = (SANITIZER, '--tool', 'memcheck', '--print-limit', '3')


class _Process:
    """A stage's process, with its output in a file."""

    def __init__(
        self, stage: Stage, command: Sequence[str], findings: pathlib.Path, log: pathlib.Path, seconds: float
    ) -> None:
        self.stage, self.findings = stage, findings
        self._log, self._begin, self._deadline = log, time.monotonic(), time.monotonic() + seconds
        self._ended = 0.0
        with log.open('w') as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )

    def ready(self) -> bool:
        """Whether it has compiled, has ended, or never will."""
        return self._process.poll() is not None or time.monotonic() > self._deadline or self.compiled()

    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def compiled(self) -> bool:
        """Whether it has said so."""
        return any('ready' in found for found in read_findings(self.findings))

    def extend(self, seconds: float) -> None:
        """Gives it so many from now on."""
        self._deadline = time.monotonic() + seconds

    def finish(self) -> int | None:
        """Lets it go on, and waits; its exit code, or None if it took too long and was killed."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write('go\n')
            self._process.stdin.close()
        try:
            return self._process.wait(max(0.1, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()  # also what a process that has ended left behind
            self._ended = time.monotonic()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def seconds(self) -> float:
        return self._ended - self._begin

    def last_lines(self, count: int = 12) -> list[str]:
        return [text[:400] for text in self._log.read_text(errors='replace').splitlines()[-count:]]


def reasons(outcome: Outcome) -> list[str]:
    """Why a stage did not pass."""
    found = [found[key] for found in outcome.findings for key in ('failed', 'crashed') if key in found]
    if outcome.why and not any('crashed' in finding for finding in outcome.findings):
        found.append(outcome.why)
    return [*outcome.sanitizer[1:2], *found] or outcome.last_lines[-1:]


def line(outcome: Outcome) -> str:
    """A stage in a line; why, where it did not pass."""
    text = f'{outcome.name:38} {outcome.state:22} {outcome.seconds:6.1f} s'
    if outcome.state in (FAILED, CRASHED, TIMED_OUT):
        text += f'  exit code {outcome.exit_code}: {" | ".join(reasons(outcome))[:500]}'
    return text


def table(outcomes: Sequence[Outcome], describe: Callable[[Outcome], str]) -> str:
    """All stages, a line each, those that did not pass last."""
    order = sorted(outcomes, key=lambda o: (o.state != PASSED, o.state))
    return '\n'.join(f'{o.name:38} {o.state:22} {o.seconds:6.1f} s  {describe(o)}' for o in order)
