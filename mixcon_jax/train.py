"""The training loop: ``train(config, workdir)`` begins a run, goes on with it, or says that it is done.

Dispatch step n, then read the metrics of step n-1: the device always has work. Whatever is due after a step (metrics,
evaluation, checkpoint, in this order) is due for every start of the run alike, so a run that was killed, at any moment,
repeats the steps after its newest checkpoint and ends with the same metrics and parameters, bit for bit.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from mixcon_jax import config as configs
from mixcon_jax import startup
from mixcon_jax.data import Share, open_dataset
from mixcon_jax.errors import Exit, UserError
from mixcon_jax.evaluate import score
from mixcon_jax.host import processes, stuck
from mixcon_jax.host.signals import StopRequest
from mixcon_jax.models import accounting
from mixcon_jax.parallel.layout import own_rows
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.runs.checkpoints import Checkpoints, Meta
from mixcon_jax.runs.fingerprint import fingerprint
from mixcon_jax.runs.goodput import Clock
from mixcon_jax.runs.metrics import Metrics
from mixcon_jax.runs.records import Record, last
from mixcon_jax.runs.scores import describe, is_finite, scores_of, summary
from mixcon_jax.runs.trace import Trace
from mixcon_jax.runs.workdir import Workdir, report_if_finished
from mixcon_jax.step import make_steps

READING_BACK = 24 * 3600  # seconds that others wait for the first to read a save back, at most


@dataclasses.dataclass(frozen=True)
class Result:
    """How ``train`` ended.

    Attributes:
      exit_code: 0 done, 75 stopped by a signal and saved, 3 aborted: steps, or the scores of the end, were not finite.
      step: steps made.
      fingerprint: hash of the parameters of a run that is done, else empty.
      metrics: of a run that is done, those of the final evaluation: loss, perplexity, accuracy, bits_per_byte (None
        without text), tokens, bytes, by_length where there are several, and baselines (of text ``gzip`` and ``unigram``
        in bits per byte, of a task ``chance``).
    """

    exit_code: int
    step: int
    fingerprint: str = ''
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)


class _Stopped(Exception):
    """A signal came during an evaluation."""


class _NotFinite(Exception):
    """Too many steps in a row had a loss or gradient that was not finite, or an update left such parameters."""

    def __init__(self, step: int, bad_steps: int) -> None:
        super().__init__(step)
        self.step, self.bad_steps = step, bad_steps


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> Result:
    """Trains to ``config.train.steps``.

    Args:
      config: an experiment's; it need not be validated.
      workdir: the run's folder. If a run is there, it goes on from its newest intact checkpoint; options that change
        the updates must be the same then (``configs.free`` lists those that need not).

    Raises:
      UserError: one line on what the user can mend: configuration, data, workdir, a full disk.
    """
    config = configs.validate(config)
    if (record := report_if_finished(config, workdir)) is not None:
        metrics = scores_of(record) | {'baselines': record.get('baselines', {})}
        return Result(Exit.DONE, record['step'], record['fingerprint'], metrics)
    folder = Workdir(workdir)
    startup.set_up_jax(config)
    startup.require_same_options(config)
    configs.check_mesh(config, jax.device_count())
    with folder.locked() if jax.process_index() == 0 else contextlib.nullcontext():
        begun = folder.require_same(config)
        with contextlib.ExitStack() as stack:
            return _train(config, folder, startup.tokens_of(begun, config), stack)


def _train(
    config: ml_collections.ConfigDict, folder: Workdir, tokens: tuple[str, ...], stack: contextlib.ExitStack
) -> Result:
    """``train`` on devices, with these token stores if they are there; what it opens is closed with ``stack``."""
    clock, first_process = Clock(), jax.process_index() == 0
    last_step = config.train.steps

    # ----- Data, model, files ----------------------------------------------------------------------------------------
    with clock.spend('startup'):
        dataset = open_dataset(config, tokens)
        tokenizer, tokenizer_json = dataset.tokenizer, dataset.tokenizer.to_json()
        startup.require_vocabulary(config, tokenizer)
        startup.require_same_text(dataset.identity, tokenizer)
        mesh = make_mesh(config.mesh)
        share = Share(*own_rows(mesh))
        train_batches = dataset.train_batches(share)
        heldout = watched = dataset.heldout_batches(config.eval.batch_size, share=share)
        if config.eval.max_rows:  # fewer rows during the run
            watched = dataset.heldout_batches(config.eval.batch_size, config.eval.max_rows, share)

        steps = make_steps(config, mesh)
        flops = accounting.flops_per_token(config.model, config.data.seq_len)
        metrics = Metrics(folder.path, config, clock, flops, startup.peak_flops(config), active=first_process)
        stack.callback(metrics.close)
        trace = Trace(config.log, folder.path / 'profile', metrics.say)
        stack.callback(trace.end)
        startup.banner(metrics.say, config, folder, steps, train_batches, heldout, tokenizer)
        keep = config.checkpoint
        checkpoints = Checkpoints(folder.checkpoints, keep.keep_last, keep.keep_best, say=metrics.say)
        stack.callback(checkpoints.close)

        # ----- Where to begin ----------------------------------------------------------------------------------------
        # 1. After the newest intact checkpoint of this run. If there were some and none is intact, restore() refuses.
        # 2. This run was killed before its first checkpoint: its metrics are dropped, and 3 or 4 applies again.
        # 3. At step 0 with the weights of another run, where train.init_from names one: those that it named first.
        # 4. At step 0 with initial weights.
        folder.update()
        restored = checkpoints.restore(steps.abstract_state, expected=folder.last_saved)
        origin = processes.of_first(folder.init_from())
        if restored is not None:
            state, meta = restored
            before = configs.from_dict(meta.config)
            folder.require_updates_of(before, meta.step, config)
            startup.require_same_data(meta, dataset.identity, tokenizer, config)
            metrics.say(f'going on after step {meta.step} of {last_step}')
            startup.say_extended(metrics.say, before, config, meta.step)
        else:
            state, meta = steps.init_state(), Meta(0, config.to_dict())
            if source := config.train.init_from:
                state, origin = startup.with_weights_of(source, origin, config, state, steps, tokenizer, metrics.say)
        if first_process:
            folder.commit(config, tokenizer_json, origin)  # only now: what is refused above leaves the files alone
        records = metrics.start(meta.step, meta.tokens_seen)
        metrics.record('run', meta.step, event='resumed' if restored else 'started', devices=jax.device_count())
        checkpoints.prune()  # only now: nothing refuses the start any more
        batches = train_batches.iterate(meta.step)
        stack.callback(batches.close)

    # ----- What happens between steps --------------------------------------------------------------------------------
    stop = stack.enter_context(StopRequest(processes.told_to_stop if jax.process_count() > 1 else None))
    compiled: set[str] = set()
    pending: tuple[int, Any] | None = None  # a dispatched step and its metrics, not read yet
    bad_steps = 0

    @contextlib.contextmanager
    def running(name: str) -> Iterator[None]:
        """Counts the first call of a jitted function as compilation; JAX returns from others before they have run."""
        if name in compiled:
            yield
            return
        before = clock.seconds['compile']
        with clock.spend('compile'):
            yield
        compiled.add(name)
        metrics.say(f'compiled  {name} in {clock.seconds["compile"] - before:.1f} s')

    def evaluate(kind: str, rows: Any, step: int) -> Record:
        """Scores the parameters on held-out rows; raises _Stopped when a signal comes meanwhile."""

        def eval_batch(batch: Mapping[str, np.ndarray]) -> Mapping[str, jax.Array]:
            if stop.due():
                raise _Stopped
            with running(f'eval_step of {batch["tokens"].shape[1]} tokens'):
                return steps.eval_step(state, steps.put(batch))

        with clock.spend('evaluation'):
            values = score(eval_batch, rows, step).as_record()
        metrics.say(f'{kind} · step {step} · {describe(values)}')
        metrics.record(kind, step, **values)
        return {'step': step} | values

    def save(step: int, urgent: bool) -> None:
        with clock.spend('checkpoint'):
            if not urgent:
                note(checkpoints.wait())
            metrics.sync()  # a checkpoint must never be ahead of the records
            loss = next((scores['loss'] for scores in (scored, final) if scores and scores['step'] == step), None)
            contents = Meta(step, config.to_dict(), tokenizer_json, dataset.identity, metrics.tokens_seen, loss)
            note(checkpoints.save(state, contents, urgent))

    def note(complete: int | None) -> None:
        if complete is not None:
            metrics.record('checkpoint', complete)

    def read_pending() -> None:
        """Waits for the dispatched step; raises _NotFinite when it is one too many that went wrong."""
        nonlocal pending, bad_steps
        if pending is not None:
            number, values = pending
            seen = metrics.train(number, values)
            pending, bad_steps = None, int(seen['bad_steps'])
            if bad_steps >= config.train.max_bad_steps or seen['broken']:
                raise _NotFinite(number, bad_steps)

    # ----- The loop: `step` steps have been made ---------------------------------------------------------------------
    step = saved = meta.step
    scored, final = processes.of_first([last(records, kind='eval'), last(records, kind='final', step=last_step)])
    try:
        while True:
            # What is due now. Nothing of it depends on where this start of the run began.
            at_end, stopping = step == last_step, stop.due()
            score_due = _due(step, config.eval.every, at_end) and not _covers(scored, step, watched)
            save_due = _due(step, config.checkpoint.every, at_end) and step != saved
            if score_due or save_due or at_end or stopping or trace.ends_after(step):
                read_pending()
            if trace.ends_after(step):
                trace.end()
            try:
                if score_due and not stopping:
                    scored = evaluate('eval', watched, step)
                    checkpoints.learn(step, scored['loss'])
                if at_end and not stopping and final is None:
                    if scored is not None and _covers(scored, step, heldout):  # the very same rows
                        final = scored
                        metrics.record('final', step, **scores_of(final))
                    else:
                        final = evaluate('final', heldout, step)
            except _Stopped:
                stopping = True
            # In bad steps parameters stay as they are, so the checkpoints from before them need not make way.
            if (save_due and (at_end or not bad_steps)) or (stopping and step != saved):
                save(step, urgent=stopping)
                saved = step
            if at_end or stopping:
                break

            # One step: dispatch it, then read the one before.
            if trace.begins_after(step):
                read_pending()
                trace.begin()
            with clock.spend('data'), stuck.own():
                batch = next(batches)
            with running('train_step'):
                state, values = steps.train_step(state, steps.put(batch))
            read_pending()
            step += 1
            pending = (step, values)
            note(checkpoints.finished())
    except _NotFinite as error:
        return _abort(error, metrics, checkpoints, clock)

    # ----- The end ---------------------------------------------------------------------------------------------------
    trace.end()
    with clock.spend('checkpoint'):
        note(checkpoints.wait())
        processes.meet(READING_BACK)
    if stopping:
        metrics.record('run', step, event='stopped', **clock.spent())
        if step == 0:
            metrics.say('stopped before the first step: nothing is saved, and the same command begins again')
        else:
            metrics.say(f'saved step {step} of {last_step}; the same command goes on from there')
        return Result(Exit.STOPPED, step)
    assert final is not None  # the loop ends with it
    if not is_finite(final):
        metrics.record('run', step, event='aborted', **clock.spent())
        metrics.say(
            f'error: the held-out loss after {step} steps is not finite, so this run is not done; its last steps are in'
            f' {folder.metrics_file}; begin another one with a lower optim.learning_rate'
        )
        return Result(Exit.ABORTED, step)
    digest = fingerprint(state.params, folder.checkpoints / str(step))
    result = scores_of(final) | {'baselines': dataset.baselines()}
    record = {'fingerprint': digest, 'tokens_seen': metrics.tokens_seen} | result
    metrics.record('run', step, event='done', **record, **clock.spent())
    metrics.sync()
    metrics.say(summary(step, record))
    metrics.say(clock.describe())
    return Result(Exit.DONE, step, digest, result)


# ---------------------------------------------------------------------------------------------------------------------
# In the loop, and after
# ---------------------------------------------------------------------------------------------------------------------
def _covers(scores: Record | None, step: int, rows: Any) -> bool:
    """Whether these scores are of this step and of all these rows, which of a task have one of several lengths."""
    if scores is None or scores['step'] != step:
        return False
    return scores.get('tokens') == rows.num_tokens and tuple(scores.get('lengths') or ()) == rows.lengths


def _due(step: int, every: int, at_end: bool) -> bool:
    return every > 0 and step > 0 and (at_end or step % every == 0)


def _abort(error: _NotFinite, metrics: Metrics, checkpoints: Checkpoints, clock: Clock) -> Result:
    """Ends a run that makes no more progress; its checkpoints stay as they are."""
    with contextlib.suppress(UserError):
        checkpoints.wait()
    kept, step, bad_steps = checkpoints.steps(), error.step, error.bad_steps
    first = step - max(bad_steps, 1) + 1
    metrics.record('run', step, event='aborted', first_bad_step=first, last_bad_step=step, **clock.spent())
    if bad_steps:
        what = f'loss or gradient was not finite in {bad_steps} steps in a row, {first} to {step}'
    else:
        what = f'the update of step {step} left parameters that are not finite'
    newest, begin = 'there is no checkpoint yet', ''
    if kept:
        newest = f'the newest checkpoint is {kept[-1]}'
        begin = f', which --config.train.init_from={checkpoints.folder.parent}:{kept[-1]} begins from it'
    metrics.say(
        f'error: {what}; {newest}; a lower optim.learning_rate or optim.clip_norm may help, in another workdir{begin}'
    )
    return Result(Exit.ABORTED, step)
