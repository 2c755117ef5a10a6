"""What differences between arms are worth: means over seeds, and paired differences with t intervals."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import special

from mixcon_jax.reports.arms import Arm
from mixcon_jax.reports.runs import number

CONFIDENCE = 0.95
FEWEST_PAIRS = 3  # for an interval


@dataclasses.dataclass(frozen=True)
class Score:
    """A held-out score: its key in records, its name, its unit and which side of 0 is a gain."""

    key: str
    name: str
    unit: str
    better: str = 'negative'


LOSS = Score('loss', 'held-out loss', 'nats per token')
BITS = Score('bits_per_byte', 'held-out score', 'bits per byte')
ACCURACY = Score('accuracy', 'held-out accuracy', 'share of answers', better='positive')


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of n values: mean, sample standard deviation (NaN for one value), smallest and largest."""

    n: int
    mean: float
    sd: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """An arm's final scores minus the baseline's, paired by seed.

    Attributes:
      by_seed: the differences.
      mean: their mean; NaN without a pair.
      error: the mean's standard error; NaN with fewer than two pairs.
      interval: 95 % t interval of the mean, None with fewer than three pairs.
      strict: the interval at which this and all other comparisons of the report hold together with 95 % (Bonferroni).
      same_sign: how many seeds have the mean's sign.
    """

    by_seed: Mapping[int, float]
    mean: float
    error: float
    interval: tuple[float, float] | None
    strict: tuple[float, float] | None
    same_sign: int

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def verdict(self) -> str:
        """``lower`` or ``higher`` where the interval leaves out 0, otherwise why not."""
        return _verdict(self.interval, self.n)

    @property
    def strict_verdict(self) -> str:
        return _verdict(self.strict, self.n)


def _verdict(interval: tuple[float, float] | None, pairs: int) -> str:
    if interval is None:
        return 'no pair' if not pairs else f'fewer than {FEWEST_PAIRS} pairs'
    if interval[0] <= 0 <= interval[1]:
        return 'not resolved'
    return 'lower' if interval[1] < 0 else 'higher'


def summary(values: Iterable[float]) -> Summary:
    """Summarises values; all of it NaN when there is none."""
    array = np.array(list(values), np.float64)
    if not len(array):
        return Summary(0, math.nan, math.nan, math.nan, math.nan)
    sd = float(array.std(ddof=1)) if len(array) > 1 else math.nan
    return Summary(len(array), float(array.mean()), sd, float(array.min()), float(array.max()))


def paired(ours: Mapping[int, float], base: Mapping[int, float], comparisons: int = 1) -> Difference:
    """Compares ``{seed: score}`` with the baseline's over the seeds that both have.

    Args:
      comparisons: how many such comparisons the report makes.
    """
    by_seed = {seed: ours[seed] - base[seed] for seed in sorted(ours.keys() & base.keys())}
    about = summary(by_seed.values())
    error = about.sd / math.sqrt(about.n) if about.n else math.nan
    same_sign = sum(np.sign(value) == np.sign(about.mean) for value in by_seed.values())
    return Difference(
        by_seed, about.mean, error, _interval(about, error, 1), _interval(about, error, comparisons), int(same_sign)
    )


def _interval(about: Summary, error: float, comparisons: int) -> tuple[float, float] | None:
    if about.n < FEWEST_PAIRS:
        return None
    half = error * t_factor(about.n, comparisons)
    return about.mean - half, about.mean + half


def t_factor(n: int, comparisons: int = 1) -> float:
    """Half the width, in standard errors, of the two-sided t interval for the mean of n values."""
    return float(special.stdtrit(n - 1, 1 - (1 - CONFIDENCE) / (2 * comparisons)))


def score_for(arms: Sequence[Arm]) -> Score:
    """The loss; bits per byte where arms cut the same text into different tokens; of tasks the accuracy."""
    finals = [(run.text, run.final) for arm in arms for run in arm.finished if run.final is not None]
    if finals and all(not final.get('bytes') and math.isfinite(number(final, 'accuracy')) for _, final in finals):
        return ACCURACY
    tokens: dict[tuple, set[float]] = {}
    for text, final in finals:
        tokens.setdefault(text, set()).add(number(final, 'tokens'))
    return BITS if any(len(counts) > 1 for counts in tokens.values()) else LOSS


def against(arms: Sequence[Arm], baseline: Arm, score: Score) -> tuple[dict[str, Difference], list[str]]:
    """Compares every other arm with the baseline; seeds whose runs were scored on different text make no pair.

    Returns:
      ``{label: difference}``, and notes about pairs that were left out.
    """
    base = {run.seed: run for run in baseline.finished}
    pairs, elsewhere = {}, []
    for arm in arms:
        if arm is baseline:
            continue
        shared = {run.seed for run in arm.finished if run.seed in base}
        same = {run.seed for run in arm.finished if run.seed in shared and run.text == base[run.seed].text}
        if shared - same:
            elsewhere.append(arm.label)
        pairs[arm.label] = {seed: value for seed, value in arm.finals(score.key).items() if seed in same}
    base_scores = baseline.finals(score.key)
    with_interval = sum(len(ours.keys() & base_scores.keys()) >= FEWEST_PAIRS for ours in pairs.values())
    notes = (
        [f'scored on other text than {baseline.label}, so not compared: {", ".join(elsewhere)}'] if elsewhere else []
    )
    return {label: paired(ours, base_scores, max(1, with_interval)) for label, ours in pairs.items()}, notes
