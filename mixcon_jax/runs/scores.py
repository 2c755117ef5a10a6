"""Held-out scores of a run as its records hold them, in words. Loads neither JAX nor NumPy."""

import math
from collections.abc import Mapping
from typing import Any

from mixcon_jax.parsing import number

SCORES = ('loss', 'perplexity', 'accuracy', 'bits_per_byte', 'tokens', 'bytes')
BASELINES = {'gzip': 'gzip -9', 'unigram': 'byte unigrams', 'chance': 'chance', 'context': 'context alone'}


def scores_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of scores, and no more."""
    return {key: record[key] for key in (*SCORES, 'lengths', 'by_length') if key in record}


def is_finite(scores: Mapping[str, Any]) -> bool:
    """Whether the loss of held-out scores is a number; a record has null where it was not."""
    return math.isfinite(number(scores.get('loss')))


def is_complete(record: Mapping[str, Any]) -> bool:
    """Whether a record has all that is shown of a run that is done: finite scores, and the parameters' fingerprint."""
    try:
        summary(0, record)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):  # it was written by something else
        return False
    return isinstance(record['fingerprint'], str) and is_finite(record)


def describe(values: Mapping[str, Any]) -> str:
    """Scores in a line."""
    numbers = {key: number(values.get(key)) for key in SCORES}
    if not values['bytes']:  # a task
        table = values.get('by_length', {})
        lengths = ', '.join(f'{length}: {part["accuracy"]:.3f}' for length, part in table.items())
        return f'loss {numbers["loss"]:.4f} · accuracy {numbers["accuracy"]:.4f}' + (f' ({lengths})' if lengths else '')
    per_byte = f'{numbers["bits_per_byte"]:.4f} bits per byte'
    if values.get('bits_per_byte') is None:
        per_byte = 'no bits per byte: the tokens are not known to hold all of the text'
    return f'loss {numbers["loss"]:.4f} · perplexity {numbers["perplexity"]:.2f} · {per_byte}'


def summary(step: int, record: Mapping[str, Any]) -> str:
    """How a run ended: its scores beside what simpler models reach, and the fingerprint of its parameters."""
    floors = record.get('baselines', {})
    beside = ', '.join(f'{name} {floors[key]:.4f}' for key, name in BASELINES.items() if key in floors)
    return (
        f'done after {step} steps · held out: {describe(record)}'
        + (f' ({beside})' if beside else '')
        + f'\nparameters {record["fingerprint"]}'
    )
