"""A run's folder as training uses it: who may, for which configuration, and what is decided there once.

What lies in it, ``run`` says and reads.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import ml_collections

from mixcon_jax import config as configs
from mixcon_jax.errors import UserError
from mixcon_jax.host import locks
from mixcon_jax.host.files import write_whole
from mixcon_jax.host.paths import expand_folder
from mixcon_jax.options import THROUGH_TOKENS, decaying_steps
from mixcon_jax.runs import mark, saved
from mixcon_jax.runs.records import Record
from mixcon_jax.runs.run import DONE, Run
from mixcon_jax.runs.scores import summary


class Workdir(Run):
    """The folder of one run, to train in.

    Raises:
      UserError: the path is empty or its home unknown.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(expand_folder(mark.path_of(path)).absolute())
        self.mark_file, self.tokenizer_file = self.path / mark.MARK, self.path / 'tokenizer.json'

    def has_progress(self) -> bool:
        """Whether there is anything to lose: a checkpoint, also one that is damaged, or metrics of a step.

        Raises:
          UserError: it cannot be read.
        """
        return any(re.match('[0-9]', name) for name in saved.names(self.checkpoints)) or (
            self.update() and self.step > 0
        )

    def finished(self, config: ml_collections.ConfigDict) -> Record | None:
        """The last record of a run that has made all of ``config``'s steps, or None.

        Raises:
          UserError: the run here is of another configuration.
        """
        self.update()
        if self.outcome(configs.get(config, 'train.steps', None)) != DONE:
            return None
        try:
            config = configs.check_each(config)
        except configs.ConfigError:  # which whoever goes on with it says
            return None
        begun = self.require_same(config)
        if begun is None:
            return self.event if self.config_file.exists() else None
        # Whether it is the same text under another name is for the tokens to say.
        return None if renamed(configs.from_dict(begun['config']), config) else self.event

    def require_same(self, config: ml_collections.ConfigDict) -> dict[str, Any] | None:
        """Refuses a configuration that would make other updates than the run here, as far as the two show it.

        What the run here is, its newest checkpoint says; config.json counts only while there is none.

        Returns:
          What that checkpoint holds besides arrays; None if there is none.

        Raises:
          UserError: lists what differs.
        """
        contents = saved.newest(self.checkpoints)
        if contents is not None:
            self.require_updates_of(configs.from_dict(contents['config']), contents['step'], config)
        elif self.config_file.exists() and self.has_progress():
            self.require_updates_of(configs.read(self.config_file), 0, config)
        return contents

    def require_updates_of(self, was: ml_collections.ConfigDict, made: int, config: ml_collections.ConfigDict) -> None:
        """Refuses ``config`` if a run of ``was`` cannot go on with it after ``made`` steps.

        Another number of steps is taken where it leaves those that are made as they are, or where train.extend asks
        for it. So are other words for the data, once there is a checkpoint by whose hash they can be judged
        (``startup.require_same_data``).

        Raises:
          UserError: lists what differs.
        """
        differences = configs.differences(configs.resolve(was), configs.resolve(config))
        free = configs.free(was, config).union(THROUGH_TOKENS if made else ())
        changed = {key: values for key, values in differences.items() if key not in free}
        steps, hint = config.train.steps, ''
        if set(changed) == {'train.steps'}:
            if steps < made:
                hint = f'; {made} steps are made already'
            elif config.train.extend or same_schedule(was, config, made):
                return
            else:
                hint = (
                    f'; with optim.schedule={config.optim.schedule} the steps made so far depend on it:'
                    ' --config.train.extend=true goes on all the same, with a jump of the learning rate'
                )
        if changed:
            raise UserError(
                f'{self.path} holds a run of another configuration ({listed(changed)}{hint}); set these back, or take'
                ' another workdir'
            )

    # ----- what is decided once -----

    def init_from(self) -> dict[str, Any] | None:
        """What ``train.init_from`` meant when this run began, as ``commit`` wrote it; None if nothing is known."""
        found = (mark.read(self.path) or {}).get('init_from')
        known = isinstance(found, dict) and isinstance(found.get('source'), str) and type(found.get('step')) is int
        return found if known else None

    def commit(
        self, config: ml_collections.ConfigDict, tokenizer_json: str, init_from: Mapping[str, Any] | None = None
    ) -> None:
        """Writes mark, configuration and tokenizer, each as a whole; from the first on, the folder is a run's.

        Args:
          config: the run's, resolved.
          tokenizer_json: text of the tokenizer.json.
          init_from: ``source``, ``step`` and ``fingerprint`` of the weights that it began with.
        """
        values = {'init_from': dict(init_from)} if init_from else {}
        texts = {
            self.mark_file: mark.text(values),
            self.config_file: configs.to_json(config),
            self.tokenizer_file: tokenizer_json,
        }
        for path, text in texts.items():
            with explained(path):
                write_whole(path, text.encode())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and holds its lock, which the system releases however the process ends.

        Leaves no folder behind when it made it and nothing was committed to it.

        Raises:
          UserError: another process is training here, the folder cannot be written, or holds files of others.
        """
        mark.require_ours(self.path)
        made = not self.path.exists()
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / '.lock', 'a', encoding='utf-8')  # noqa: SIM115 (open as long as the run)
        with file:
            if not take_lock(file):
                raise UserError(f'another process is training in {self.path}; wait for it, or stop it')
            try:
                yield
            finally:
                if made and not self.mark_file.exists():
                    (self.path / '.lock').unlink(missing_ok=True)
                    with contextlib.suppress(OSError):  # something else is in them
                        if self.checkpoints.exists():
                            self.checkpoints.rmdir()
                        self.path.rmdir()


def same_schedule(was: ml_collections.ConfigDict, now: ml_collections.ConfigDict, made: int) -> bool:
    """Whether the learning rates of ``made`` steps are the same under two lengths of the run.

    So they are before warm-up-stable-decay decays in either length, while any other schedule warms up, and while it is
    constant: then going on gives what the longer run would have given from the start, bit for bit.
    """
    if was.optim.schedule != now.optim.schedule:
        return False
    if now.optim.schedule == 'wsd':  # whose decay may begin before the end of the warm-up
        stable = lambda config: config.train.steps - decaying_steps(config.optim.decay_fraction, config.train.steps)
        return all(made <= stable(each) for each in (was, now))
    return now.optim.schedule == 'constant' or made <= min(was.optim.warmup_steps, now.optim.warmup_steps)


def renamed(was: ml_collections.ConfigDict, now: ml_collections.ConfigDict) -> dict[str, tuple[Any, Any]]:
    """What two configurations say differently of their data, though it may be the same: see ``configs.differences``."""
    return {key: both for key, both in configs.differences(was, now).items() if key in THROUGH_TOKENS}


def listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences of two configurations in words."""
    return ', '.join(f'{key} {was!r} -> {now!r}' for key, (was, now) in changed.items())


def report_if_finished(config: ml_collections.ConfigDict, path: str | Path) -> Record | None:
    """Says so if the run at ``path`` is done, and returns its last record; loads no JAX, so it answers at once.

    Args:
      config: an experiment's; it need not be validated.
      path: the workdir.
    """
    folder = Workdir(path)
    record = folder.finished(config)
    if record is not None:
        print(f'{folder.path} is {summary(record["step"], record)}', flush=True)
        if not folder.saved_steps():
            print('its checkpoints are gone, and its weights with them; another workdir trains anew', flush=True)
    return record


def take_lock(file: IO[Any]) -> bool:
    """Whether this process, and those that inherit the file, now hold its lock; also where there are no locks."""
    return locks.take(file) is not False


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror or error}') from error
