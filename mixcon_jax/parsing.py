"""What files and users say, read so that nothing in it ends a command with anything but a word on it.

Loads neither JAX nor NumPy.
"""

import json
import math
from pathlib import Path
from typing import Any

Record = dict[str, Any]

STEP_DIGITS = 18  # of the largest step that anything here counts to
MAPPINGS = ('stats', 'time_shares', 'baselines')  # of a record, where it has them
NUMBERS = ('time', 'loss', 'perplexity', 'accuracy', 'bits_per_byte', 'tokens', 'bytes', 'tokens_seen', 'seconds')
YEAR_10000 = 253_402_300_800  # in seconds since 1970: later times no clock shows
SCORES = ('loss', 'tokens', 'bytes')
NEEDED = {'train': ('loss',), 'eval': SCORES, 'final': SCORES}  # by kind, of a record


def json_object(text: str | bytes) -> dict[str, Any]:
    """The object that a JSON text is.

    Raises:
      ValueError: it is none: no JSON, not UTF-8, nested deeper than can be read, or another value.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError('it is nested too deeply') from error
    if not isinstance(found, dict):
        raise ValueError('it is no JSON object')
    return found


def json_file(path: str | Path) -> dict[str, Any] | None:
    """The object that a JSON file holds, or None: there is no such file, or it cannot be read as one."""
    try:
        return json_object(Path(path).read_bytes())
    except (OSError, ValueError):
        return None


def record(line: bytes) -> Record | None:
    """The record that a line of metrics.jsonl is, or None: it was cut short, or is something else.

    A record has a kind, a step that is an integer of at least 0, and what is NEEDED of its kind. Under the names of
    NUMBERS it has numbers or null, under those of MAPPINGS objects; its time is one that clocks show.
    """
    try:
        found = json_object(line)
    except ValueError:
        return None
    kind, step = found.get('kind'), found.get('step')
    good = (
        isinstance(kind, str)
        and type(step) is int
        and 0 <= step < 10**STEP_DIGITS
        and all(name in found for name in NEEDED.get(kind, ()))
        and all(_is_number(found[name]) for name in NUMBERS if found.get(name) is not None)
        and all(isinstance(found[name], dict) for name in MAPPINGS if name in found)
        and 0 <= (found.get('time') or 0) < YEAR_10000
    )
    return found if good else None


def number(value: Any) -> float:
    """A number of a record; what is null there, or is none, counts as NaN."""
    return float(value) if _is_number(value) else math.nan


def step(text: str) -> int | str | None:
    """Which checkpoint a user means: its step, ``'best'``, or None for the newest, which is called ``last``.

    Raises:
      ValueError: it is none of these.
    """
    if text in ('best', 'last'):
        return 'best' if text == 'best' else None
    if text.isascii() and text.isdecimal() and len(text) <= STEP_DIGITS:
        return int(text)
    raise ValueError(f'{text!r} must be a number, "best" or "last"')


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float holds; of integers, those of hundreds of digits are not."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**1000)
