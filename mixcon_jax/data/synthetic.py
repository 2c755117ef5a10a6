"""Synthetic tasks: sequences that are made as they are needed, with answers at known positions.

``synthetic:selective_copying``  symbols stand at random places among noise; at the end they are asked for, in their
                                 order (Gu and Dao, 2023, after Arjovsky et al., 2016)
``synthetic:induction``          a special token stands once before some symbol, and again at the end: which symbol?
                                 (Olsson et al., 2022, in the form of Gu and Dao, 2023)
``synthetic:mqar``               multi-query associative recall: pairs of key and value, then the keys again, each
                                 followed by noise, most soon and some late (Arora et al., 2023, but for their
                                 vocabulary of thousands, and fillers that are drawn from it)

Only answers are scored, and ``accuracy`` is their share that is predicted right. A batch is a function of (seed, step)
alone. With a curriculum, sequences grow from ``min_length`` to ``data.seq_len`` tokens and from ``min_items`` to
``items`` things to remember, over ``curriculum_steps`` steps; short sequences are packed, as documents are.
"""

import dataclasses
import json
from collections.abc import Callable, Generator, Iterator
from typing import Any

import ml_collections
import numpy as np
import tokenizers
from jaxtyping import Bool, Float, Int
from tokenizers import models, pre_tokenizers

from mixcon_jax.data.packing import GOLDEN, MASK, WHOLE, Share, empty_batch, key_of, mix_array
from mixcon_jax.data.tokenizer import END_OF_TEXT, Tokenizer

PREFIX = 'synthetic:'
END, NOISE, ASK = 0, 1, 2  # ids of the tokens that are no symbols
SYMBOLS = 3  # id of the first symbol
HELDOUT = 1 << 62  # in the place of a seed, which is always smaller

Batch = dict[str, np.ndarray]
Examples = tuple[Int[np.ndarray, 'n l'], Int[np.ndarray, 'n l'], Bool[np.ndarray, 'n l']]


class Draws:
    """Random numbers that a key names, the same on every machine and with every version of every library."""

    def __init__(self, *key: int) -> None:
        self._key, self._used = key, 0

    def uniform(self, *shape: int) -> Float[np.ndarray, '...']:
        """Numbers in (0, 1]."""
        self._used += 1
        start = key_of(*self._key, self._used)
        size = int(np.prod(shape))
        counter = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(start & MASK)
        return ((mix_array(counter) >> np.uint64(11)).astype(np.float64) + 0.5).reshape(shape) / (1 << 53)

    def integers(self, high: int, *shape: int) -> Int[np.ndarray, '...']:
        """Integers in [0, high)."""
        return np.minimum(self.uniform(*shape) * high, high - 1).astype(np.int64)

    def subsets(self, count: int, size: int, of: int, weights: Float[np.ndarray, 'of'] | None = None) -> Any:
        """``count`` draws of ``size`` distinct numbers below ``of``, in random order: int64 [count, size].

        Numbers with larger weights come more likely, and earlier (Efraimidis and Spirakis, 2006).
        """
        arrivals = -np.log(self.uniform(count, of)) / (1.0 if weights is None else weights)
        return np.argsort(arrivals, axis=1, kind='stable')[:, :size]


# ---------------------------------------------------------------------------------------------------------------------
# The tasks: (draws, examples, tokens of each, items to remember, symbols, trained length) -> tokens, targets, mask
# ---------------------------------------------------------------------------------------------------------------------
def selective_copying(draws: Draws, count: int, length: int, items: int, symbols: int, trained: int) -> Examples:
    """Noise with ``items`` symbols at random places, then as many times ASK, which the symbols answer in order."""
    del trained
    context = length - items
    values = SYMBOLS + draws.integers(symbols, count, items)
    places = np.sort(draws.subsets(count, items, context), axis=1)
    tokens = np.full((count, length), NOISE)
    np.put_along_axis(tokens, places, values, axis=1)
    tokens[:, context:] = ASK
    targets = np.zeros_like(tokens)
    targets[:, context:] = values
    return tokens, targets, tokens == ASK


def induction(draws: Draws, count: int, length: int, items: int, symbols: int, trained: int) -> Examples:
    """Random symbols; ASK stands once before the symbol to recall, and at the end."""
    del items, trained  # there is always one item
    tokens = SYMBOLS + draws.integers(symbols, count, length)
    place = draws.integers(length - 2, count)
    rows = np.arange(count)
    tokens[rows, place] = ASK
    tokens[:, -1] = ASK
    targets, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    targets[:, -1] = tokens[rows, place + 1]
    mask[:, -1] = True
    return tokens, targets, mask


def mqar(draws: Draws, count: int, length: int, items: int, symbols: int, trained: int) -> Examples:
    """``items`` pairs of distinct keys and distinct values, then every key once more, which its value answers.

    The first half of the symbols are keys, the second values. Every query is followed by noise. Of the places after the
    pairs, the g-th takes a query with a probability that falls as g^-0.99 (the published exponent, 0.01 - 1). In
    sequences longer than those trained all places are as likely: else most queries would stand where training had them.
    """
    half, space = symbols // 2, (length - 2 * items) // 2
    keys = SYMBOLS + draws.subsets(count, items, half)
    values = SYMBOLS + half + draws.subsets(count, items, half)
    tokens = np.full((count, length), NOISE)
    tokens[:, 0 : 2 * items : 2], tokens[:, 1 : 2 * items : 2] = keys, values
    weights = np.arange(1, space + 1) ** (0.0 if length > trained else -0.99)
    places = 2 * items + 2 * draws.subsets(count, items, space, weights)
    np.put_along_axis(tokens, places, keys, axis=1)
    targets, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    np.put_along_axis(targets, places, values, axis=1)
    np.put_along_axis(mask, places, True, axis=1)
    return tokens, targets, mask


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of synthetic task.

    Attributes:
      make: the function that makes examples.
      shortest: the least number of tokens that hold so many items.
    """

    make: Callable[[Draws, int, int, int, int, int], Examples]
    shortest: Callable[[int], int]


TASKS = {
    'selective_copying': Task(selective_copying, lambda items: 2 * items),
    'induction': Task(induction, lambda items: 4),
    'mqar': Task(mqar, lambda items: 4 * items),
}


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------
def is_synthetic(data: ml_collections.ConfigDict) -> bool:
    """Whether ``data.sources`` asks for a synthetic task."""
    return any(spec.startswith(PREFIX) for spec in data.sources)


def check(data: ml_collections.ConfigDict) -> None:
    """Refuses options that no sequence can satisfy.

    Raises:
      ValueError: names the key.
    """
    if len(data.sources) > 1:
        raise ValueError(f'data.sources={data.sources}: a synthetic task cannot be mixed with other sources')
    name, task = data.sources[0].removeprefix(PREFIX), data.synthetic
    if name not in TASKS:
        raise ValueError(f'data.sources: {data.sources[0]!r} is no task; known: {", ".join(TASKS)}')
    for key in ('min_length', 'min_items'):
        if task[key] and not task.curriculum_steps:
            raise ValueError(f'data.synthetic.{key}={task[key]} does nothing without data.synthetic.curriculum_steps')
    if task.min_length > data.seq_len:
        raise ValueError(f'data.synthetic.min_length={task.min_length} exceeds data.seq_len={data.seq_len}')
    if task.min_items > task.num_items:
        raise ValueError(f'data.synthetic.min_items={task.min_items} exceeds data.synthetic.num_items={task.num_items}')
    if name == 'mqar' and task.num_items > task.symbols // 2:
        raise ValueError(
            f'data.synthetic.num_items={task.num_items} needs as many keys, which are half of'
            f' data.synthetic.symbols={task.symbols}; use at least {2 * task.num_items} symbols'
        )
    shortest, first = TASKS[name].shortest(task.num_items), TASKS[name].shortest(task.min_items or task.num_items)
    for key, length, items, least in (
        ('seq_len', data.seq_len, task.num_items, shortest),
        ('synthetic.min_length', task.min_length or data.seq_len, task.min_items or task.num_items, first),
        ('synthetic.eval_lengths', min(task.eval_lengths, default=data.seq_len), task.num_items, shortest),
    ):
        if length < least:
            raise ValueError(
                f'data.{key}: {length} tokens are too few for {name} with {items} items; take at least {least}'
            )


def tokenizer(data: ml_collections.ConfigDict) -> Tokenizer:
    """One word a token: '_' is noise, '?' asks, 's0', 's1' ... are the symbols."""
    words = [END_OF_TEXT, '_', '?', *(f's{i}' for i in range(data.synthetic.symbols))]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token='_'))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend, data.sources[0])


def baselines(config: ml_collections.ConfigDict) -> dict[str, float]:
    """Accuracies without memory for places: ``chance``, guessing among all answers there are, and ``context``.

    ``context`` always names the commonest symbol of those that the sequence's answers are, measured on the held-out
    sequences: what a model gets that has seen which symbols there were, and nothing else.
    """
    answers = [batch['targets'][row][batch['loss_mask'][row]]
               for batch in SyntheticHeldout(config, 0) for row in range(len(batch['targets']))
               if batch['loss_mask'][row].any()]  # fmt: skip
    task = config.data.synthetic
    symbols = task.symbols // 2 if config.data.sources[0] == PREFIX + 'mqar' else task.symbols
    if all(len(row) == 1 for row in answers):  # naming the one symbol is to have solved it
        return {'chance': 1 / symbols}
    common = sum(np.unique(row, return_counts=True)[1].max() for row in answers)
    return {'chance': 1 / symbols, 'context': float(common / sum(map(len, answers)))}


def identity(data: ml_collections.ConfigDict) -> tuple[str, ...]:
    """What the training sequences depend on besides the seed."""
    task = {key: data.synthetic[key] for key in ('symbols', 'num_items', 'min_items', 'min_length', 'curriculum_steps')}
    return (json.dumps({'source': data.sources[0], 'seq_len': data.seq_len} | task),)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------
def fill(batch: Batch, examples: list[Examples]) -> None:
    """Writes examples, each a list over the batch's rows, one after the other into the rows, as documents."""
    start = 0
    for document, (tokens, targets, mask) in enumerate(examples):
        stop = start + tokens.shape[1]
        batch['tokens'][:, start:stop], batch['targets'][:, start:stop] = tokens, targets
        batch['loss_mask'][:, start:stop], batch['segment_ids'][:, start:stop] = mask, document + 1
        batch['positions'][:, start:stop] = np.arange(stop - start)
        start = stop


class SyntheticTrain:
    """Endless training batches of a task; batch i depends on the seed, i and the options alone.

    Attributes:
      num_tokens: None, since no text is used up.
    """

    num_tokens = None

    def __init__(self, config: ml_collections.ConfigDict, share: Share = WHOLE) -> None:
        self._seed, self._data = config.seed, config.data
        self._task = TASKS[config.data.sources[0].removeprefix(PREFIX)]
        self._batch_size = config.train.batch_size
        self._own = share.rows(self._batch_size, 'train.batch_size')

    def difficulty(self, step: int) -> tuple[int, int]:
        """Tokens and items of a sequence at ``step``: lengths grow by a constant factor, items by a constant number."""
        task = self._data.synthetic
        progress = min(step / task.curriculum_steps, 1.0) if task.curriculum_steps else 1.0
        first, least = task.min_length or self._data.seq_len, task.min_items or task.num_items
        items = round(least + progress * (task.num_items - least))
        length = round(first * (self._data.seq_len / first) ** progress)
        return max(length, self._task.shortest(items)), items

    def __getitem__(self, step: int) -> Batch:
        """This process's share of batch ``step``, [rows of its own, T]."""
        length, items = self.difficulty(step)
        symbols = self._data.synthetic.symbols
        batch = empty_batch(len(self._own), self._data.seq_len)
        examples = []
        for place in range(self._data.seq_len // length):
            draws = Draws(self._seed, step, place)
            made = self._task.make(draws, self._batch_size, length, items, symbols, self._data.seq_len)
            tokens, targets, mask = (part[self._own] for part in made)
            examples.append((tokens, targets, mask))
        fill(batch, examples)
        return batch

    def iterate(self, start: int = 0) -> Generator[Batch]:
        """Batches from ``start`` on, without end."""
        step = start
        while True:
            yield self[step]
            step += 1


class SyntheticHeldout:
    """Batches of a fixed set of sequences at every length of ``eval_lengths``, one sequence a row.

    Attributes:
      num_tokens: answers in all of them.
      num_bytes: 0, since there is no text.
    """

    num_bytes = 0.0

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        batch_size: int,
        *,
        max_rows: int = 0,
        share: Share = WHOLE,
    ) -> None:
        self._data, self.batch_size = config.data, batch_size or config.train.batch_size
        self._task = TASKS[config.data.sources[0].removeprefix(PREFIX)]
        task = config.data.synthetic
        self.num_rows = min(max_rows, task.eval_rows) if max_rows else task.eval_rows
        self.lengths = tuple(sorted(set(task.eval_lengths) or {config.data.seq_len}))
        self._own = share.rows(self.batch_size, 'eval.batch_size')
        # Every sequence of a task has as many answers.
        self.num_tokens = sum(self.num_rows * int(self._example(length, 0)[2].sum()) for length in self.lengths)

    def _example(self, length: int, row: int) -> Examples:
        """One sequence, which depends on its length and number alone."""
        task = self._data.synthetic
        draws = Draws(HELDOUT, length, row)
        return self._task.make(draws, 1, length, task.num_items, task.symbols, self._data.seq_len)

    def __iter__(self) -> Iterator[Batch]:
        for length in self.lengths:
            for start in range(0, self.num_rows, self.batch_size):
                batch = empty_batch(len(self._own), length)
                for place, row in enumerate(self._own):
                    if start + row < self.num_rows:
                        one = {name: array[place : place + 1] for name, array in batch.items()}
                        fill(one, [self._example(length, start + row)])
                yield batch
