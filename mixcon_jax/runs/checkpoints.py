"""Checkpoints: state, data position, configuration and tokenizer, saved and restored as one.

``checkpoints/<step>/`` is written by Orbax in the background under another name and renamed when complete, so a kill
leaves none that is half there. Inside are three items: ``model`` (parameters and buffers), ``optimizer`` (the rest of
the state) and ``meta`` (everything that is no array, and a checksum of every array). A save counts, and makes older
ones superfluous, only when everything it wrote has been read back (readback.py). Restoring verifies each array; a
checkpoint that is damaged is set aside as ``<step>.damaged`` and the one before it is used.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils

from mixcon_jax.errors import UserError
from mixcon_jax.host import processes
from mixcon_jax.host.log_filters import silence_orbax
from mixcon_jax.runs import mark, readback, restoring, retention, saved, stored
from mixcon_jax.runs.checksums import checksums
from mixcon_jax.runs.records import read
from mixcon_jax.runs.run import METRICS
from mixcon_jax.runs.saved import ARRAYS, Damaged, item_of
from mixcon_jax.trees import Shapes, Tree, named_leaves

Say = Callable[[str], None]
# Of arrays by name, or what finds them for a Meta and the shapes of what lies there.
Shardings = Mapping[str, Any] | Callable[[Any, Shapes], Mapping[str, Any]]
FULL = ('No space left', 'Disk quota exceeded', 'File too large', 'RESOURCE_EXHAUSTED')


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint holds besides arrays.

    Attributes:
      step: steps made; the data position too, since batch i is a function of i.
      config: the whole configuration, ``ConfigDict.to_dict()``.
      tokenizer: text of the tokenizer.json.
      data: names of the token stores, in order.
      tokens_seen: tokens trained on so far.
      heldout_loss: in nats per token, or None if it was not evaluated at this step.
    """

    step: int
    config: dict[str, Any]
    tokenizer: str = ''
    data: tuple[str, ...] = ()
    tokens_seen: int = 0
    heldout_loss: float | None = None


class _Manager(ocp.CheckpointManager):
    """Orbax's, which is not to ask whether to stop: ``StopRequest`` does, and counts how often all have asked."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: ``workdir/checkpoints``; made when missing, unless read only.
      keep_last: newest checkpoints kept.
      keep_best: checkpoints kept for their held-out loss; only steps that were evaluated count.
      say: takes one line about each damaged checkpoint.
      read_only: change nothing on disk; damaged checkpoints stay where they are.
    """

    def __init__(
        self,
        folder: str | Path,
        keep_last: int = 2,
        keep_best: int = 1,
        say: Say = print,
        read_only: bool = False,
    ) -> None:
        self.folder, self._say, self._read_only = Path(folder).absolute(), say, read_only
        self._keep_last, self._keep_best = keep_last, keep_best
        self._pending: tuple[int, Future[list[str] | None]] | None = None
        self._hurry = threading.Event()
        self._unread: dict[int, str] = {}  # digests of what is written but not read back, by step
        self._worker, self._stack = ThreadPoolExecutor(1, 'checkpoint'), contextlib.ExitStack()
        silence_orbax()
        if not read_only:
            mark.require_folder(self.folder)
            self._clean()
        # A run that was stopped before an evaluation makes it up after the save: then only its records know the loss.
        written = read(self.folder.parent / METRICS)
        evaluated = {record['step']: record['loss'] for record in written if record['kind'] == 'eval'}
        self._losses = {step: self._saved_loss(step) or evaluated.get(step) for step in saved.steps(self.folder)}
        options = ocp.CheckpointManagerOptions(read_only=read_only, create=False)  # keeps all: _prune() deletes
        handlers = {item: ocp.StandardCheckpointHandler() for item in ARRAYS} | {'meta': ocp.JsonCheckpointHandler()}
        self._plain = self._stack.enter_context(readback.PlainPath(self.folder))
        self._manager = _Manager(self._plain.path, options=options, item_handlers=handlers)

    def _clean(self) -> None:
        """Removes what unfinished saves left."""
        if jax.process_index() == 0:
            retention.remove_unfinished(self.folder)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices('checkpoints: cleaned')

    def _saved_loss(self, step: int) -> float | None:
        """The held-out loss in a checkpoint's metadata, or None: not evaluated, or unreadable, as restoring says."""
        try:
            return saved.contents(self.folder, step).get('heldout_loss')
        except (Damaged, UserError):
            return None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return saved.steps(self.folder)

    def best_step(self) -> int | None:
        """The step with the lowest held-out loss among those that are kept, or None if none was evaluated."""
        return next(iter(retention.best_steps(self.steps(), self._losses)), None)

    def learn(self, step: int, heldout_loss: float) -> None:
        """Takes the held-out loss of a checkpoint that was saved before it was evaluated."""
        if step in self._losses:
            self._losses[step] = heldout_loss

    def prune(self) -> None:
        """Deletes what newer or better checkpoints make superfluous, as a save does: a kill may have come before it."""
        if jax.process_index() == 0:
            for line in self._prune():
                self._say(line)

    # ----- saving -----

    def save(self, state: Tree, meta: Meta, urgent: bool = False) -> int | None:
        """Begins to save, and to read back, in the background; returns when the state's buffers may be reused.

        Waits for the save before it, if that has not finished.

        Args:
          state: a TrainState, or any tree whose leaves' names begin with ``params/`` or ``buffers/`` for the model.
          meta: the rest. ``state`` must be that of ``meta.step``.
          urgent: the process may be killed soon. The save before it, once it is written, is read back no further, but
            again after this one.

        Returns:
          As ``wait`` of the save before it.

        Raises:
          UserError: this save, or the one before it, found the disk full or the like, or wrote what cannot be read.
        """
        if urgent:
            self._hurry.set()
        before = self.wait()
        self._hurry.clear()
        arrays = named_leaves(state)
        contents = dataclasses.asdict(meta) | {
            'arrays': {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()},
            'checksums': checksums(arrays),
        }
        items = {}
        for item in ARRAYS:
            part = _part(arrays, item)  # no part of an array must be too large to be read by whoever needs little of it
            items[item] = ocp.args.StandardSave(part, dict.fromkeys(part, ocp.SaveArgs(chunk_byte_size=stored.CHUNK)))
        described = ocp.args.JsonSave({'sha256': saved.digest(contents), 'contents': contents})
        args = ocp.args.Composite(**items, meta=described)
        self._losses[meta.step] = meta.heldout_loss
        with self._explained(meta.step):
            self._plain.mend()
            self._manager.save(meta.step, args=args, force=True)
            self._pending = meta.step, self._worker.submit(self._complete, meta.step, saved.digest(contents))
        return before

    def _complete(self, step: int, digest: str) -> list[str] | None:
        """In a thread: waits for the save, reads it back and deletes what it makes superfluous.

        Returns:
          What to say, or None if it was in a hurry and has not read it all.
        """
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        if jax.process_index() > 0:
            return []
        lines = []
        for each, expected in sorted((self._unread | {step: digest}).items(), reverse=True):
            self._unread.pop(each, None)
            try:
                readback.verify(self.folder, each, expected, self._hurry)
            except readback.Interrupted:
                self._unread[each] = expected
                return None
            except Damaged as error:
                if each == step:
                    raise
                retention.set_aside(self.folder / str(each))
                lines.append(f'checkpoint {each} cannot be read back ({error}); set aside as {each}.damaged')
            else:
                with contextlib.suppress(OSError):  # a checkpoint is one without the note, too
                    saved.note_files(self.folder, each)
        return lines + self._prune()

    def _prune(self) -> list[str]:
        return retention.prune(self.folder, self._losses, self._keep_last, self._keep_best)

    def finished(self) -> int | None:
        """The step of a save that has been read back since the last call, if any; never waits.

        Raises:
          UserError: it failed.
        """
        if self._pending is None or not self._pending[1].done():
            return None
        return self.wait()

    def wait(self) -> int | None:
        """Returns when no save is in progress: the step of the one it waited for, if that was read back.

        Raises:
          UserError: the save failed; checkpoints before it are intact.
        """
        if self._pending is None:
            return None
        step, future = self._pending
        with self._explained(step):
            lines = future.result()
        self._pending = None
        for line in lines or ():
            self._say(line)
        return None if lines is None else step

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turns a failure to write into one line, and removes what was written."""
        try:
            yield
        except Exception as error:
            self._pending = None
            kept = [kept for kept in self.steps() if kept != step]
            last = f'checkpoint {max(kept)} is intact' if kept else 'there is none before it'
            if isinstance(error, UserError):
                raise
            if isinstance(error, Damaged):
                if jax.process_index() == 0:
                    retention.set_aside(self.folder / str(step))
                raise UserError(
                    f'checkpoint {step} in {self.folder} cannot be read back ({error}); set aside as {step}.damaged;'
                    f' {last}; check the disk and run again'
                ) from error
            text = ' '.join(_causes(error))
            if not isinstance(error, OSError) and not any(words in text for words in (*FULL, 'Permission denied')):
                raise
            retention.remove_unfinished(self.folder)
            reason = next((words for words in FULL[:3] if words in text), text.splitlines()[0][:200])
            raise UserError(
                f'cannot save checkpoint {step} in {self.folder}: {reason}; {last}; make room and run again'
            ) from error

    def close(self) -> None:
        """Waits for a save in progress, whatever becomes of it, and frees threads."""
        with contextlib.suppress(Exception):
            self.wait()
        with contextlib.suppress(Exception):
            self._manager.close()
        self._worker.shutdown()
        self._stack.close()
        if not self._read_only and jax.process_index() == 0:
            retention.remove_unfinished(self.folder)

    # ----- restoring -----

    def restore(self, abstract_state: Tree, expected: int | None = None) -> tuple[Tree, Meta] | None:
        """The newest intact checkpoint, laid out as ``abstract_state`` says, or None if there is none at all.

        Args:
          abstract_state: ``jax.ShapeDtypeStruct`` with shardings: any mesh, not only the one that saved.
          expected: newest step that is known to have been complete; a line is said if it is gone.

        Raises:
          UserError: all are damaged or gone, they are of another model, or the newest cannot be read.
        """
        # Others may see newer ones of a run that goes on.
        steps, expected = processes.of_first([self.steps(), expected])
        if expected is not None and expected not in steps and (not steps or steps[-1] < expected):
            self._say(f'checkpoint {expected} is missing from {self.folder}')
        for step in reversed(steps):
            try:
                return self._restore(step, abstract_state)
            except Damaged as error:
                self._report(step, str(error))
        if processes.of_first(bool(steps) or expected is not None or any(self.folder.glob('*.damaged*'))):
            raise UserError(
                f'no intact checkpoint is left in {self.folder}; copy one back, or take another workdir to begin anew'
            )
        return None

    def load(self, step: int | str | None = None, shardings: Shardings | None = None) -> tuple[Tree, Meta]:
        """Parameters and buffers alone: ``{'params': nested dicts, 'buffers': nested dicts}``, and the rest.

        Args:
          step: a step; ``'best'`` by held-out loss; None for the newest intact one.
          shardings: see ``weights.load_params``.

        Raises:
          UserError: no such checkpoint, or it is damaged.
        """
        steps: list[int] = processes.of_first(self.steps())
        if step == 'best':
            step = processes.of_first(self.best_step())
            if step is None:
                raise UserError(f'no checkpoint in {self.folder} has a held-out loss; give a step, one of {steps}')
        if step is not None and step not in steps:
            raise UserError(f'there is no checkpoint {step} in {self.folder}; there are {steps or "none"}')
        if not steps:
            raise UserError(f'there is no checkpoint in {self.folder}')
        for candidate in steps[::-1] if step is None else [int(step)]:
            try:
                return self._load(candidate, shardings or {})
            except Damaged as error:
                self._report(candidate, str(error))
        raise UserError(f'{"no checkpoint" if step is None else f"checkpoint {step} is not"} intact in {self.folder}')

    def _restore(self, step: int, abstract_state: Tree) -> tuple[Tree, Meta]:
        wanted = named_leaves(abstract_state)

        def read() -> tuple[Meta, dict[str, jax.Array], dict[str, str]]:
            contents, meta = self._meta(step)
            restoring.require_equal(
                {n: [str(x.dtype), list(x.shape)] for n, x in wanted.items()}, contents['arrays'], step
            )
            arrays: dict[str, jax.Array] = {}
            for item in ARRAYS:
                arrays |= self._arrays(step, item, _part(wanted, item))
            return meta, arrays, contents['checksums']

        meta, arrays = restoring.verified(read)
        if jax.process_index() == 0 and not saved.is_whole(self.folder, step):
            saved.note_files(self.folder, step)  # what it has lost is nothing that it is read by
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in wanted]), meta

    def _load(self, step: int, shardings: Shardings) -> tuple[Tree, Meta]:
        def read() -> tuple[Meta, dict[str, jax.Array], dict[str, str]]:
            contents, meta = self._meta(step)
            model = _part(contents['arrays'], 'model')
            shapes = {name: tuple(shape) for name, (_, shape) in model.items()}
            where = shardings(meta, shapes) if callable(shardings) else shardings
            whole = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            wanted = {
                name: jax.ShapeDtypeStruct(shapes[name], np.dtype(dtype), sharding=where.get(name, whole))
                for name, (dtype, _) in model.items()
            }
            return meta, self._arrays(step, 'model', wanted), contents['checksums']

        meta, arrays = restoring.verified(read)
        return {'params': {}, 'buffers': {}} | unflatten_dict(arrays, sep='/'), meta

    def _arrays(self, step: int, item: str, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        self._plain.mend()
        return restoring.restore(self._plain.path / str(step) / item, wanted)

    def _meta(self, step: int) -> tuple[dict[str, Any], Meta]:
        contents = saved.contents(self.folder, step)
        try:
            fields = {field.name: contents[field.name] for field in dataclasses.fields(Meta)}
        except KeyError as error:
            raise Damaged(f'its metadata lacks {error}') from error
        return contents, Meta(**fields | {'data': tuple(fields['data'])})

    def _report(self, step: int, reason: str) -> None:
        """Says that a checkpoint is damaged and, unless read only, renames it."""
        earlier = [other for other in self.steps() if other < step]
        then = f'using checkpoint {earlier[-1]}' if earlier else 'there is none before it'
        if self._read_only:
            self._say(f'checkpoint {step} is damaged ({reason}); {then}')
            return
        self._say(f'checkpoint {step} is damaged ({reason}); set aside as {step}.damaged, {then}')
        if jax.process_index() == 0:
            retention.set_aside(self.folder / str(step))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f'checkpoints: set aside {step}')
        self._manager.reload()


def _part(arrays: Mapping[str, Any], item: str) -> dict[str, Any]:
    """Those of the arrays, or of what is known of each, that are of an item."""
    return {name: array for name, array in arrays.items() if item_of(name) == item}


def _causes(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield f'{type(error).__name__}: {error}'
        error = error.__cause__ or error.__context__
