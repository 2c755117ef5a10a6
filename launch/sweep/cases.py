"""Sweeps: the cases that an experiment file's ``sweep()`` yields, each with its configuration and its folder."""

import dataclasses
import re
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from mixcon_jax import config as configs
from mixcon_jax.config import ConfigError
from mixcon_jax.host.paths import expand
from mixcon_jax.runs.workdir import listed

NAME_LENGTH = 80  # letters of a folder's name


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of a sweep.

    Attributes:
      name: what the case is called; runs that differ in the seed alone share it.
      folder: the run's folder, below the sweep's.
      path: of the experiment file, with its argument.
      overrides: ``key=value``, as ``mixcon train --config.key=value`` takes them.
      config: the whole configuration, validated.
    """

    name: str
    folder: str
    path: str
    overrides: tuple[str, ...]
    config: ml_collections.ConfigDict


def cases(path: str, overrides: Sequence[str] = ()) -> list[Case]:
    """Returns the cases of an experiment file, in its order.

    Args:
      path: ``file.py`` or ``file.py:argument``; the argument is passed to ``sweep`` as to ``get_config``.
      overrides: ``key=value`` for all cases; where a case sets the same key, the case's value stands.

    Raises:
      ConfigError: the file defines no ``sweep()``, or a case cannot run or occurs twice.
    """
    path = expand(path, '--config')
    configs.load(path, overrides)  # its errors are clearer than those of what follows
    file, _, argument = path.partition(':')
    try:
        sweep = runpy.run_path(file).get('sweep')
        if sweep is None:
            raise ConfigError(f'{file} has no sweep(); define one that yields dicts of overrides')
        wanted = list(sweep(argument) if argument else sweep())
    except ConfigError:
        raise
    except Exception as error:  # whatever the experiment file itself raises
        raise ConfigError(f'{file}: sweep() failed: {type(error).__name__}: {error}') from error
    if not wanted:
        raise ConfigError(f'{file}: sweep() yields no case')
    found: dict[str, Case] = {}
    for number, values in enumerate(wanted):
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise ConfigError(f'{file}: sweep() must yield dicts of overrides, not {values!r}')
        try:
            case = _case(path, overrides, values)
        except ConfigError as error:
            raise ConfigError(f'case {number} of {file} ({_label(values)}): {error}') from error
        if case.folder in found:
            raise ConfigError(f'{file}: sweep() yields {case.folder} twice; give the cases distinct names or seeds')
        found[case.folder] = case
    return list(found.values())


def require_unchanged(case: Case) -> None:
    """Refuses a case of which the experiment file, which it will read by itself, makes another by now.

    Raises:
      ConfigError: names what differs, or says why the file cannot be read any more.
    """
    read = lambda: configs.validate(configs.load(case.path, case.overrides))
    now = read()
    changed = configs.differences(case.config, now)
    if changed and not configs.differences(now, read()):  # else it is another each time it is read
        raise ConfigError(f'{case.path} has changed since this sweep began ({listed(changed)}); begin the sweep again')


def _case(path: str, shared: Sequence[str], values: Mapping[str, Any]) -> Case:
    name = str(values.get('name') or _label({key: value for key, value in values.items() if key != 'seed'}) or 'run')
    values = {**values, 'name': name}
    overrides = (*shared, *(f'{key}={_literal(value)}' for key, value in values.items()))
    config = configs.load(path, overrides)
    for key, value in values.items():
        if isinstance(value, list | tuple):
            value = tuple(value)
        if configs.get(config, key) != value:
            raise ConfigError(f'{key}={value!r} became {configs.get(config, key)!r}; give it the type of the option')
    return Case(name, f'{_slug(name)}/seed-{config.seed}', path, overrides, configs.validate(config))


def _label(values: Mapping[str, Any]) -> str:
    """What tells a case apart, for cases without a name."""
    return ' '.join(f'{key.split(".")[-1]}={_text(value)}' for key, value in values.items() if key != 'name')


def _text(value: Any) -> str:
    return ','.join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _literal(value: Any) -> str:
    """As an override has it: of several texts each may hold what would separate them."""
    if not isinstance(value, list | tuple):
        return str(value)
    return f'({"".join(f"{repr(each) if isinstance(each, str) else each}, " for each in value)})'


def _slug(name: str) -> str:
    """The name as a folder's; long ones are cut, and the cases' folders must differ all the same."""
    return re.sub(r'[^\w.=-]+', '-', name)[:NAME_LENGTH].strip('-.') or 'run'
