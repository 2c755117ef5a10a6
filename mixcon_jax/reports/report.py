"""`mixcon report`: run directories become tables and figures that one can put into a paper, or argue with.

Reads metrics.jsonl and the configuration (that of the newest checkpoint where there is one, else config.json), so it
works while runs are going on and changes nothing in them.
"""

import difflib
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from mixcon_jax.errors import UserError
from mixcon_jax.host.files import write_whole
from mixcon_jax.reports import comparison, figures, tables
from mixcon_jax.reports.arms import Arm, group
from mixcon_jax.reports.page import FIGURES, Report, markdown, terminal
from mixcon_jax.reports.runs import find, number
from mixcon_jax.runs.mark import path_of
from mixcon_jax.runs.run import DONE
from mixcon_jax.runs.workdir import explained
from mixcon_jax.units import short


def report(folders: Sequence[str | Path], out: str | Path | None = None, baseline: str | None = None) -> Path:
    """Writes report.md, runs.csv, arms.csv and the figures; prints a short table.

    Args:
      folders: run directories, or folders above some.
      out: folder to write to, which gives the title; None is ``report`` in the first of ``folders``, which then does.
      baseline: label of the arm to compare the others with; None is the first.

    Returns:
      The path of report.md.

    Raises:
      UserError: there is no run, no such baseline, or ``out`` cannot be written.
    """
    target = path_of(out, '--out') if out is not None else path_of(folders[0], 'FOLDER') / 'report'
    _require_ours(target)
    found = collect(folders, baseline)
    with explained(target):
        target.mkdir(parents=True, exist_ok=True)
    _write(target / 'runs.csv', tables.to_csv(tables.run_rows(found.arms)))
    rows = tables.arm_rows(found.arms, found.baseline, found.score, found.differences)
    _write(target / 'arms.csv', tables.to_csv(rows))
    drawn = figures.draw(found.arms, found.baseline, found.score, found.differences)
    for name in FIGURES:
        for kind in ('png', 'svg'):
            path = target / f'{name}.{kind}'
            if name in drawn:
                _write(path, drawn[name][kind])
            else:  # of an earlier report, when it had the data
                with explained(path):
                    path.unlink(missing_ok=True)
    command = ['mixcon', 'report', *map(str, folders)]
    command += ['--out', str(out)] if out is not None else []
    command += ['--baseline', baseline] if baseline is not None else []
    page = target / 'report.md'
    subject = target if out is not None else target.parent
    _write(page, markdown(found, drawn.keys(), subject.absolute().name, shlex.join(command)))
    print(terminal(found))
    print(f'\n{page}')
    return page


def _require_ours(target: Path) -> None:
    """Refuses a folder in which the report would replace or delete files of something else."""
    names = ['report.md', 'runs.csv', 'arms.csv', *(f'{name}.{kind}' for name in FIGURES for kind in ('png', 'svg'))]
    foreign = [name for name in names if (target / name).is_file()]
    with explained(target):
        page = (target / 'report.md').read_bytes() if 'report.md' in foreign else b''
    if foreign and not (page.startswith(b'# Report: ') and b'\n`mixcon report ' in page):
        raise UserError(f'{target} holds {", ".join(foreign)}, but no report of mixcon; take another folder for --out')


def collect(folders: Sequence[str | Path], baseline: str | None = None) -> Report:
    """Reads the runs, groups them into arms and compares these.

    Raises:
      UserError: there is no run, or no such baseline.
    """
    runs, notes = find(folders)
    arms, more = group(runs)
    base = _baseline(arms, baseline)
    score = comparison.score_for(arms)
    differences, rest = comparison.against(arms, base, score)
    return Report(arms, base, score, differences, [*notes, *more, *_notes(arms), *rest])


def _baseline(arms: Sequence[Arm], wanted: str | None) -> Arm:
    if wanted is None:
        return arms[0]
    for arm in arms:
        if arm.label == wanted:
            return arm
    labels = [arm.label for arm in arms]
    close = difflib.get_close_matches(wanted, labels, n=1, cutoff=0.5)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    raise UserError(f'--baseline {wanted!r} is no arm; {hint}the arms are {", ".join(map(repr, labels))}')


def _notes(arms: Sequence[Arm]) -> list[str]:
    """What limits the comparison of these arms."""
    notes = []
    for arm in arms:
        if aborted := [run.seed for run in arm.runs if run.state == 'aborted']:
            notes.append(
                f'{arm.label}: seeds {_list(aborted)} ended because the loss or gradient was not finite;'
                ' its means are over the other seeds and flatter it'
            )
        if broken := [run.seed for run in arm.runs if run.state == DONE and run not in arm.finished]:
            notes.append(f'{arm.label}: seeds {_list(broken)} are done but their final loss is not finite; left out')
    finished = [run for arm in arms for run in arm.finished]
    if len({tuple(run.seed for run in arm.finished) for arm in arms if arm.finished}) > 1:
        notes.append('the arms have finished different seeds; only differences paired by seed compare them fairly')
    if len({run.text for run in finished}) > 1:
        notes.append('the arms were scored on different held-out text; compare only those of the same data.sources')
    if comparison.score_for(arms) is comparison.BITS:
        notes.append('the arms cut the same text into different tokens: compared by bits per byte, not by loss')
    tokens = {run.tokens_seen for run in finished}
    if tokens and max(tokens) > 1.01 * min(tokens):
        notes.append(f'the arms saw between {short(min(tokens))} and {short(max(tokens))} training tokens')
    if len({tuple(number(r, 'tokens') for r in run.evals[-1:]) for run in finished if run.evals}) > 1:
        notes.append('evaluations during the runs are over different rows; curves compare less well than final scores')
    if len({run.devices for arm in arms for run in arm.runs if run.rates}) > 1:
        notes.append('the runs used different numbers of devices; tokens/s do not compare')
    return notes


def _list(values: Iterable[int]) -> str:
    return ', '.join(map(str, values))


def _write(path: Path, content: str | bytes) -> None:
    """Replaces a file as a whole."""
    with explained(path):
        write_whole(path, content if isinstance(content, bytes) else content.encode(errors='backslashreplace'))
