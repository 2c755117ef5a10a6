"""Arms: the runs that differ in nothing but the seed, what tells one arm from another, and how large each model is."""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mixcon_jax import config as configs
from mixcon_jax.host.ending import one_line
from mixcon_jax.models import accounting
from mixcon_jax.reports.runs import ReportedRun, number
from mixcon_jax.runs.run import DONE

LONG_CONTEXT = 8192  # tokens at which decode state is stated, beside the trained length
ABSENT = '–'  # the value of an option of model.layers that an arm does not give
Options = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Costs:
    """What an arm's model costs.

    Attributes:
      counts: numbers of parameters.
      flops_per_token: of training, forward and backward, at the trained length.
      state_bytes: decode state of one sequence with the trained length as its context.
      state_bytes_long: the same with 8192 tokens.
    """

    counts: accounting.Counts
    flops_per_token: float
    state_bytes: int
    state_bytes_long: int


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """Runs of one configuration.

    Attributes:
      label: its name, unique in the report.
      runs: one a seed, by seed.
      options: the options in which the arms differ, with this arm's values; those that follow from others left out.
    """

    label: str
    runs: tuple[ReportedRun, ...]
    options: Options

    @property
    def config(self):
        return self.runs[0].config

    @functools.cached_property
    def finished(self) -> tuple[ReportedRun, ...]:
        """The runs that are done with a finite loss: the only ones that enter means."""
        return tuple(run for run in self.runs if run.state == DONE and math.isfinite(number(run.final, 'loss')))

    @property
    def costs(self) -> Costs:
        return _costs(json.dumps(self.config.model.to_dict(), sort_keys=True), self.config.data.seq_len)

    @property
    def tokens_per_second(self) -> float:
        """Median over all training records of all runs; NaN when there is none."""
        rates = [rate for run in self.runs for rate in run.rates]
        return float(np.median(rates)) if rates else math.nan

    @property
    def tokens_seen(self) -> float:
        """Mean over the finished runs, or the most of any when none is."""
        if self.finished:
            return float(np.mean([run.tokens_seen for run in self.finished]))
        return max(run.tokens_seen for run in self.runs)

    def finals(self, key: str) -> dict[int, float]:
        """``{seed: final score}`` of the finished runs that have it."""
        scores = {run.seed: number(run.final, key) for run in self.finished}
        return {seed: value for seed, value in scores.items() if math.isfinite(value)}

    def states(self) -> dict[str, int]:
        """``{state: number of runs}``, done first."""
        states = sorted((run.state for run in self.runs), key=lambda state: (state != DONE, state))
        return {state: states.count(state) for state in dict.fromkeys(states)}


@functools.cache
def _costs(model: str, seq_len: int) -> Costs:
    """Of a model as JSON; each takes JAX a fraction of a second."""
    options = configs.from_dict({'model': json.loads(model)}).model
    return Costs(
        accounting.parameter_count(options),
        accounting.flops_per_token(options, seq_len),
        accounting.state_bytes(options, seq_len),
        accounting.state_bytes(options, LONG_CONTEXT),
    )


def group(runs: Sequence[ReportedRun]) -> tuple[list[Arm], list[str]]:
    """Groups runs that differ only in the seed and in options that enter no update (``configs.free``).

    Arms come in the order in which their lowest seeds were started, which for a sweep is the experiment file's order;
    if they differ in one number alone, in that number's order.

    Returns:
      The arms, and notes about runs that occur twice.
    """
    together: dict[str, list[ReportedRun]] = {}
    for run in runs:
        together.setdefault(json.dumps(_identity(run), sort_keys=True), []).append(run)
    notes: list[str] = []
    groups = sorted((_one_a_seed(found, notes) for found in together.values()), key=_first_started)
    options = _differing(groups)
    labels = _labels([_name(found) for found in groups], options)
    arms = [Arm(label, found, chosen) for label, found, chosen in zip(labels, groups, options)]
    if key := numeric_axis(arms):
        arms.sort(key=lambda arm: arm.options[key])
    for arm in arms:
        names = sorted({run.config.name for run in arm.runs if run.config.name})
        if len(names) > 1:
            notes.append(f'the same configuration runs under several names: {", ".join(names)}; shown as {arm.label}')
    return arms, notes


def numeric_axis(arms: Sequence[Arm]) -> str | None:
    """The option that is swept, if the arms differ in that one alone and it is a number."""
    keys = list(arms[0].options)
    if len(keys) != 1 or len(arms) < 2:
        return None
    return keys[0] if all(type(arm.options[keys[0]]) in (int, float) for arm in arms) else None


def _identity(run: ReportedRun) -> Options:
    """The options that make a run's updates, but for the seed."""
    free = configs.free(run.config)
    options = {key: value for key, value in configs.flatten(run.config).items() if key not in free}
    del options['seed']
    # A run that starts from the weights of the same seed of another sweep differs in the seed alone.
    options['train.init_from'] = re.sub(rf'\bseed-{run.seed}\b', 'seed-*', options['train.init_from'])
    return options


def _one_a_seed(runs: Iterable[ReportedRun], notes: list[str]) -> tuple[ReportedRun, ...]:
    """One run of each seed: of copies, which are not independent, the one that is done or has come furthest."""
    chosen: dict[int, ReportedRun] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.state != DONE, -run.step, str(run.path))):
        if run.seed in chosen:
            notes.append(f'left out: {run.path} has the configuration and seed of {chosen[run.seed].path}')
        chosen.setdefault(run.seed, run)
    return tuple(chosen.values())


def _first_started(runs: Sequence[ReportedRun]) -> tuple:
    return runs[0].started, natural(_name(runs)), str(runs[0].path)


def _name(runs: Sequence[ReportedRun]) -> str:
    """The configuration's name, or the folder's: its parent's where that only tells the seed."""
    if name := next((run.config.name for run in runs if run.config.name), ''):
        return name
    path = runs[0].path.absolute()
    name = path.parent.name if re.fullmatch(r'seed[-_]?\d+', path.name) else path.name
    return os.fsencode(name).decode(errors='replace')  # figures take no bytes that are no text


def natural(text: str) -> list[tuple[int, int | str]]:
    """Sorts ``d=16`` behind ``d=8``."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r'(\d+)', text) if part]


def _differing(groups: Sequence[Sequence[ReportedRun]]) -> list[Options]:
    """For each arm its values of the options in which arms differ, but for those that follow from others."""
    every = [_identity(runs[0]) for runs in groups]
    named = dict.fromkeys(key for options in every for key in options)  # arms may give groups of model.layers
    keys = [key for key in named if len({repr(options.get(key)) for options in every}) > 1]
    keys = [key for key in keys if not all(_is_derived(runs[0], key) for runs in groups)]
    return [{key: options.get(key, ABSENT) for key in keys} for options in every]


def _is_derived(run: ReportedRun, key: str) -> bool:
    """Whether the option has the value that follows from others, or is left to others as in no ``model.layers``."""
    if configs.get(run.config, key, None) is None:
        return True
    option = configs.known(run.config)[key]
    if option.derive is None:
        return False
    config = configs.canonical(run.config)
    configs.put(config, key, option.default)
    return configs.get(configs.resolve(config), key) == configs.get(run.config, key)


def _labels(names: Sequence[str], options: Sequence[Options]) -> list[str]:
    """The names; arms that share one are told apart by as few of the options in which they differ as do it."""
    labels = list(names)
    for name in dict.fromkeys(names):
        same = [index for index, other in enumerate(names) if other == name]
        if len(same) == 1:
            continue
        distinct = {key: len({repr(options[index][key]) for index in same}) for key in options[same[0]]}
        keys = sorted((key for key in distinct if distinct[key] > 1), key=lambda key: -distinct[key])
        for few in range(1, len(keys) + 1):
            told = [_told(options[index], keys[:few]) for index in same]
            if len(set(told)) == len(same):
                break
        else:  # numbers that are alike in few digits
            told = [_told(options[index], keys, repr) for index in same]
        for index, text in zip(same, told):
            labels[index] = f'{name} ({text})'
    return [one_line(label) for label in labels]


def _told(options: Options, keys: Sequence[str], words: Callable[[Any], str] | None = None) -> str:
    return ', '.join(f'{key.split(".")[-1]}={(words or shown)(options[key])}' for key in keys)


def shown(value: Any) -> str:
    """An option's value, repeated elements counted: ``3 x conba+mlp, attention+mlp``."""
    if not isinstance(value, tuple):
        return f'{value:g}' if isinstance(value, float) else str(value)
    parts: list[tuple[Any, int]] = []
    for item in value:
        if parts and parts[-1][0] == item:
            parts[-1] = (item, parts[-1][1] + 1)
        else:
            parts.append((item, 1))
    return ', '.join(f'{count} x {item}' if count > 1 else str(item) for item, count in parts)
