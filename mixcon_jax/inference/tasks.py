"""``mixcon lm-eval``: a checkpoint on tasks of EleutherAI's lm-evaluation-harness, ``lm_eval``, imported here alone."""

import json
import logging
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixcon_jax.data.synthetic import is_synthetic
from mixcon_jax.errors import UserError, first_line
from mixcon_jax.host.files import file_to_write, write_whole
from mixcon_jax.inference import harness
from mixcon_jax.inference.harness import Answers
from mixcon_jax.inference.load import TrainedModel, load_model
from mixcon_jax.units import columns

BATCH = 8  # rows at a time
RESAMPLES = 1000  # for the standard errors that have no formula
KEPT = ('results', 'groups', 'versions', 'n-shot', 'n-samples', 'higher_is_better', 'configs', 'lm_eval_version')
Say = Callable[[str], None]


def lm(trained: TrainedModel, batch_size: int = BATCH, max_length: int = 0, say: Say = lambda line: None) -> Any:
    """The model as an ``lm_eval.api.model.LM``, for ``lm_eval.simple_evaluate(model=...)``.

    Args:
      trained: the model, of ``load_model``.
      batch_size: rows at a time.
      max_length: tokens that are read at most; 0 means as many as the run's rows have.
      say: takes a line from time to time.

    Raises:
      UserError: lm_eval is not installed, or the run was not trained on text.
    """
    if is_synthetic(trained.config.data):
        raise UserError(f'the run was trained on {trained.config.data.sources[0]}, not on text')
    base = _library().api.model.LM

    class OfRun(Answers, base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            Answers.__init__(self, trained, batch_size, max_length or trained.config.data.seq_len, say)

    return OfRun()


def run(
    workdir: str | Path,
    tasks: Sequence[str],
    *,
    step: int | str | None = None,
    batch_size: int = BATCH,
    max_length: int = 0,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: str = '',
    json_file: str = '',
    mesh: Sequence[str] = (),
    say: Say = print,
) -> str:
    """Evaluates a checkpoint on tasks of lm_eval; returns the results as a table.

    Args:
      workdir: a run directory.
      tasks: names of tasks, groups and tags, or patterns of them.
      step: a checkpoint's step, ``'best'`` or None for the newest.
      batch_size, max_length: as ``lm`` has them.
      num_fewshot: examples before each question; None takes the task's own number.
      limit: questions of each task at most; None takes all.
      include_path: a folder with tasks of one's own.
      json_file: where to write the results, too, with the tasks' configurations.
      mesh: overrides of ``load_model``.
      say: takes a line from time to time.

    Raises:
      UserError: lm_eval is not installed, or does not know a task, whose data cannot be loaded; no such checkpoint; or
        ``json_file`` cannot be written.
    """
    library = _library()
    from lm_eval.tasks import TaskManager

    file = file_to_write('--json', json_file) if json_file else None
    if include_path and not os.path.isdir(include_path):
        raise UserError(f'--include-path {include_path} is no folder')
    manager = TaskManager(include_path=include_path or None)
    asked = [name for given in tasks for name in given.split(',') if name]
    for task in asked:
        if not manager.match_tasks([task]):
            raise UserError(f'lm_eval has no task {task!r}; `lm-eval ls tasks` lists those that it has')
    trained = load_model(workdir, step, mesh)
    model = lm(trained, batch_size, max_length, say)
    try:
        found = library.simple_evaluate(
            model, tasks=manager.match_tasks(asked), num_fewshot=num_fewshot, limit=limit, task_manager=manager,
            log_samples=False, bootstrap_iters=RESAMPLES,
        )  # fmt: skip
    except OSError as error:  # of a set of questions that is not there, or a hub that cannot be reached
        raise UserError(f'the questions of {" ".join(asked)} cannot be loaded: {first_line(error)}') from error
    except Exception as error:
        if isinstance(error, UserError) or any(
            frame.name in vars(Answers) and frame.filename == harness.__file__
            for frame in traceback.extract_tb(error.__traceback__)
        ):
            raise  # it comes of an answer, and not of a task's own file
        raise UserError(f'lm_eval cannot run {" ".join(asked)}: {type(error).__name__}: {first_line(error)}') from error
    if file:
        kept = {'workdir': str(workdir), 'step': trained.step} | {name: found[name] for name in KEPT if name in found}
        try:
            write_whole(file, (json.dumps(kept, indent=2, default=str) + '\n').encode())
        except OSError as error:
            print(_table(found))  # which took long
            raise UserError(f'--json {file} cannot be written: {error.strerror}') from error
    return _table(found)


def _table(found: Mapping[str, Any]) -> str:
    """Tasks, and groups of them, in aligned columns with a line a metric."""
    lines = [('task', 'questions', 'shots', 'metric', 'value', 'standard error')]
    for task, values in found['results'].items():
        counts = found['n-samples'].get(task, {}).get('effective', ''), found['n-shot'].get(task, '')
        for name, value in values.items():
            metric, of, kind = name.partition(',')
            if of and not metric.endswith('_stderr'):
                error = values.get(f'{metric}_stderr,{kind}')
                shown = metric if kind == 'none' else f'{metric} ({kind})'
                lines.append((values.get('alias', task), *map(str, counts), shown, _number(value), _number(error)))
    return columns(lines)


def _number(value: Any) -> str:
    return f'{value:.4f}' if isinstance(value, int | float) else ''


def _library() -> Any:
    """lm_eval, kept from what it does beside its tasks: it forks processes, which JAX's threads forbid, and it logs."""
    os.environ.setdefault('DISABLE_MULTIPROC', '1')  # else it forks for standard errors
    try:
        import datasets
        import lm_eval.api.model
        import lm_eval.evaluator
    except ImportError as error:
        raise UserError(
            f'lm_eval cannot be imported ({error}); install the extra lm-eval: bash launch/bootstrap.sh lm-eval'
        ) from error
    # These set their own levels when they are imported. A warning of lm_eval's tells of a file that is no task.
    for name, level in (('lm_eval', logging.WARNING), ('datasets', logging.ERROR), ('huggingface_hub', logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    datasets.disable_progress_bars()
    lm_eval.evaluator.add_env_info = lambda storage: None  # of the machine, for which it forks
    lm_eval.evaluator.get_git_commit_hash = lambda: None  # of the folder that one is in, whatever it has to do with it
    return lm_eval
