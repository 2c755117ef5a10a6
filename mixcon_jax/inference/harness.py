"""A run as a model of lm-evaluation-harness: its tasks, such as HellaSwag or LAMBADA, straight from a checkpoint.

``lm_eval`` (EleutherAI, Gao et al., 2021) brings the tasks and their metrics, and asks three things of a model, which
are here. It is imported by ``lm`` and ``run`` alone.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixcon_jax.errors import UserError, first_line
from mixcon_jax.host.files import file_to_write, write_whole
from mixcon_jax.inference.generate import Sampling, generate
from mixcon_jax.inference.likelihood import Ending, likelihoods, rounded_up
from mixcon_jax.inference.load import TrainedModel, load_model

BATCH = 8  # rows at a time
RESAMPLES = 1000  # for the standard errors that have no formula
KEPT = ('results', 'groups', 'versions', 'n-shot', 'n-samples', 'higher_is_better', 'configs', 'lm_eval_version')
NEW_TOKENS = 256  # that are generated at most where a task says no number
Say = Callable[[str], None]


class Answers:
    """What a trained model answers to lm_eval's three kinds of requests, each of which has its ``args``.

    Every text begins a document, with the token that ends one, as in training. Of a context that does not fit the last
    tokens are taken.

    Args:
      trained: the model.
      batch_size: rows at a time.
      max_length: tokens that are read at most, the one that begins a document included.
      say: takes a line from time to time.
    """

    def __init__(self, trained: TrainedModel, batch_size: int, max_length: int, say: Say = lambda line: None) -> None:
        self._trained, self._words = trained, trained.tokenizer
        self._batch_size, self._max_length, self._say = batch_size, max_length, say

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each ``(context, continuation)``, the continuation's log-probability and whether it is the greedy one."""
        endings = [self._ending(*request.args) for request in requests]
        return [(log, greedy) for log, greedy in self._likelihoods(endings)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each ``(text,)``, its log-probability: each token's from as many before it as fit, in few windows."""
        texts = [self._words.encode(request.args[0]) for request in requests]
        parts = [list(windows([self._words.eot_id, *tokens], self._max_length)) for tokens in texts]
        found = iter(self._likelihoods([window for windows in parts for window in windows]))
        return [sum(next(found)[0] for _ in windows) for windows in parts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Of each ``(context, options)``, what follows up to the first of the texts ``until``, without it."""
        answers = [''] * len(requests)
        asked: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            asked.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for options, group in asked.items():
            for rows, texts in self._continued([requests[i].args[0] for i in group], json.loads(options)):
                for row, text in zip(rows, texts, strict=True):
                    answers[group[row]] = text
        return answers

    def _ending(self, context: str, continuation: str) -> Ending:
        """Spaces at a context's end go to what continues it, which begins with them in training."""
        kept = context.rstrip()
        whole, before = self._words.encode(context + continuation), self._words.encode(kept)
        scored = max(len(whole) - len(before), 1 if whole else 0)
        if scored > self._max_length:
            raise UserError(f'a continuation has {scored} tokens, more than --max-length {self._max_length}')
        return Ending([self._words.eot_id, *whole][-self._max_length - 1 :], scored)

    def _likelihoods(self, endings: Sequence[Ending]) -> list[tuple[float, bool]]:
        tell = lambda count: self._say(f'{count:,} of {len(endings):,} texts scored')
        return list(likelihoods(self._trained.model, endings, self._batch_size, self._trained.place, tell))

    def _continued(self, contexts: Sequence[str], options: Mapping[str, Any]) -> Iterator[tuple[list[int], list[str]]]:
        """Batches of contexts, by their places, and what follows each."""
        most = int(options.get('max_gen_toks', NEW_TOKENS))
        stops = options.get('until') or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        room = self._max_length - most
        if room < 1:
            raise UserError(f'the task generates {most} tokens, which leave no room in --max-length {self._max_length}')
        eot = self._words.eot_id
        prompts = [[eot, *self._words.encode(context)[-(room - 1) :]] if room > 1 else [eot] for context in contexts]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            filled = [prompts[i] for i in rows] + [[eot]] * (self._batch_size - len(rows))
            yield rows, self._texts(filled, most, _sampling(options), stops)[: len(rows)]
            self._say(f'{start + len(rows):,} of {len(order):,} texts continued')

    def _texts(self, prompts: list[list[int]], most: int, sampling: Sampling, stops: Sequence[str]) -> list[str]:
        words, trained = self._words, self._trained
        texts, streams = [''] * len(prompts), [words.stream(after=prompt[1:]) for prompt in prompts]
        live = [True] * len(prompts)
        length = rounded_up(max(map(len, prompts)))
        steps = generate(
            trained.model, prompts, most, sampling, range(len(prompts)), words.vocab_size, trained.place, length
        )
        for tokens in steps:
            for row, token in enumerate(tokens.tolist()):
                if live[row] and token < 0:
                    raise UserError('scores of the next token are not finite: nothing can be drawn by these weights')
                live[row] = live[row] and token != words.eot_id
                if live[row]:
                    texts[row] += streams[row].push(token)
                    live[row] = not any(stop and stop in texts[row] for stop in stops)
            if not any(live):
                break
        texts = [text + stream.flush() for text, stream in zip(texts, streams, strict=True)]
        return [min((text.split(stop)[0] for stop in stops if stop), key=len, default=text) for text in texts]


def windows(tokens: Sequence[int], most: int) -> Iterator[Ending]:
    """Cuts tokens into windows of at most ``most`` that are read, by which each token but the first is scored once.

    The last window begins so early that it is full; the others begin with one token that the one before has scored.
    """
    for start in range(1, len(tokens), most):
        end = min(start + most, len(tokens))
        yield Ending(tokens[max(0, end - most - 1) : end], end - start)


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """Greedy, unless a task wants samples."""
    if not options.get('do_sample', float(options.get('temperature') or 0) > 0):
        return Sampling(temperature=0)
    given = {name: options[name] for name in ('top_k', 'top_p') if options.get(name) is not None}
    return Sampling(temperature=float(options.get('temperature', 1.0)), **given)


def lm(trained: TrainedModel, batch_size: int = BATCH, max_length: int = 0, say: Say = lambda line: None) -> Any:
    """The model as an ``lm_eval.api.model.LM``, for ``lm_eval.simple_evaluate(model=...)``.

    Args:
      trained: the model, of ``load_model``.
      batch_size: rows at a time.
      max_length: tokens that are read at most; 0 means as many as the run's rows have.
      say: takes a line from time to time.

    Raises:
      UserError: lm_eval is not installed.
    """
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
    os.environ.setdefault('DISABLE_MULTIPROC', '1')  # else it forks for standard errors, which JAX's threads forbid
    library = _library()
    import datasets
    import lm_eval.evaluator
    from lm_eval.tasks import TaskManager

    for name in ('lm_eval', 'datasets', 'huggingface_hub'):  # which set their own when they are imported
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.evaluator.add_env_info = lambda storage: None  # of the machine, for which it forks
    lm_eval.evaluator.get_git_commit_hash = lambda: None  # of the folder that one is in, whatever it has to do with it

    file = file_to_write('--json', json_file) if json_file else None
    if include_path and not os.path.isdir(include_path):
        raise UserError(f'--include-path {include_path} is no folder')
    manager = TaskManager(include_path=include_path or None)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise UserError(f'lm_eval has no task {task!r}; `lm-eval ls tasks` lists those that it has')
    trained = load_model(workdir, step, mesh)
    try:
        found = library.simple_evaluate(
            lm(trained, batch_size, max_length, say), tasks=manager.match_tasks(list(tasks)), num_fewshot=num_fewshot,
            limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=RESAMPLES,
        )  # fmt: skip
    except OSError as error:  # of a set of questions that is not there, or a hub that cannot be reached
        raise UserError(f'the questions of {" ".join(tasks)} cannot be loaded: {first_line(error)}') from error
    if file:
        kept = {'workdir': str(workdir), 'step': trained.step} | {name: found[name] for name in KEPT if name in found}
        write_whole(file, (json.dumps(kept, indent=2, default=str) + '\n').encode())
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
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ('  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return '\n'.join(row.rstrip() for row in rows)


def _number(value: Any) -> str:
    return f'{value:.4f}' if isinstance(value, float) else ''


def _library() -> Any:
    try:
        import lm_eval
        import lm_eval.api.model
    except ImportError as error:
        raise UserError(
            f'lm_eval cannot be imported ({error}); install the extra lm-eval: bash launch/bootstrap.sh lm-eval'
        ) from error
    return lm_eval
