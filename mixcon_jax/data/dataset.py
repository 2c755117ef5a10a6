"""What a run learns from and is scored on, whatever its kind: prepared text, or a synthetic task."""

import abc
import dataclasses
import sys
from typing import Any

import ml_collections

from mixcon_jax.data import synthetic
from mixcon_jax.data.cache import changes, prepared_as
from mixcon_jax.data.loader import HeldoutBatches, TrainBatches
from mixcon_jax.data.packing import WHOLE, Share
from mixcon_jax.data.prepare import prepare
from mixcon_jax.data.prepared import PreparedStore, baselines, require_tokenizer
from mixcon_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Dataset(abc.ABC):
    """The data of one configuration; its batches are made whole, or in shares.

    Attributes:
      config: the whole configuration.
      tokenizer: of the text, or one that names a task's symbols.
      identity: what the data is known by: other data has another one.
    """

    config: ml_collections.ConfigDict
    tokenizer: Tokenizer
    identity: tuple[str, ...]

    @abc.abstractmethod
    def train_batches(self, share: Share = WHOLE) -> Any:
        """Endless training batches, of each this share."""

    @abc.abstractmethod
    def heldout_batches(self, batch_size: int, max_rows: int = 0, share: Share = WHOLE) -> Any:
        """Held-out batches, of ``max_rows`` rows, or with 0 of all; of each this share."""

    @abc.abstractmethod
    def baselines(self) -> dict[str, float]:
        """What simple models reach."""

    @abc.abstractmethod
    def require_tokenizer(self, tokenizer: Tokenizer, name: str) -> None:
        """Refuses a model's tokenizer if it is not the data's.

        Raises:
          UserError: names both.
        """


@dataclasses.dataclass(frozen=True)
class Text(Dataset):
    """Prepared text.

    Attributes:
      stores: of its tokens.
    """

    stores: tuple[PreparedStore, ...]

    def train_batches(self, share: Share = WHOLE) -> TrainBatches:
        return TrainBatches(self.config, self.stores, share)

    def heldout_batches(self, batch_size: int, max_rows: int = 0, share: Share = WHOLE) -> HeldoutBatches:
        return HeldoutBatches(self.config, self.stores, batch_size, max_rows=max_rows, share=share)

    def baselines(self) -> dict[str, float]:
        """Bits per byte of the held-out text."""
        return baselines(self.stores)

    def require_tokenizer(self, tokenizer: Tokenizer, name: str) -> None:
        require_tokenizer(self.stores, tokenizer, name)


@dataclasses.dataclass(frozen=True)
class Task(Dataset):
    """A synthetic task, made as it is needed."""

    def train_batches(self, share: Share = WHOLE) -> synthetic.SyntheticTrain:
        return synthetic.SyntheticTrain(self.config, share)

    def heldout_batches(self, batch_size: int, max_rows: int = 0, share: Share = WHOLE) -> synthetic.SyntheticHeldout:
        return synthetic.SyntheticHeldout(self.config, batch_size, max_rows=max_rows, share=share)

    def baselines(self) -> dict[str, float]:
        """The accuracy of guessing."""
        return synthetic.baselines(self.config)

    def require_tokenizer(self, tokenizer: Tokenizer, name: str) -> None:
        """Any: a task is told by its identity."""


def open_dataset(config: ml_collections.ConfigDict, identity: tuple[str, ...] = ()) -> Dataset:
    """Prepares text, or finds it prepared; a synthetic task needs nothing.

    Args:
      config: the whole configuration.
      identity: of the data that a run was trained on: its token stores are taken if they are there, whatever has become
        of the text since; a line says what has. Without them the text is prepared, and may have another identity.

    Raises:
      UserError: the text, the tokenizer or the disk does not allow it.
    """
    data = config.data
    if synthetic.is_synthetic(data):
        return Task(config, synthetic.tokenizer(data), synthetic.identity(data))
    known = prepared_as(data, identity)
    for line in changes(known or (), data):
        print(line, file=sys.stderr, flush=True)
    stores = tuple(known or prepare(data))
    return Text(config, stores[0].load_tokenizer(), tuple(store.fingerprint for store in stores), stores)
