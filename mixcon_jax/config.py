"""Configurations: ``default()`` to start from, ``load()`` an experiment file, ``validate()`` before anything compiles.

The options themselves, each with its default and meaning, stand in ``mixcon_jax.options`` and, those of a layer, in the
layer's file; ``table()`` has them all.
"""

import difflib
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from mixcon_jax import options
from mixcon_jax.checks import check_leaf, divides
from mixcon_jax.errors import ConfigError, UserError, first_line
from mixcon_jax.host.paths import expand
from mixcon_jax.models import kinds, pattern
from mixcon_jax.options import UINT32, Option, beyond
from mixcon_jax.parallel import axes
from mixcon_jax.parsing import json_object

NAMED = 'model.layers.'  # the keys of options that a pattern's names stand for


def table() -> dict[str, Any]:
    """Every option by its groups, as nested dicts: those of ``mixcon_jax.options``, and the registered layers' own."""
    return options.OPTIONS | {'model': options.OPTIONS['model'] | kinds.groups()}


def leaves() -> Iterator[tuple[str, Option]]:
    """Yields ``(dotted key, option)`` for every option."""
    return options.leaves(table())


def known(config: Any) -> dict[str, Option]:
    """``{dotted key: option}`` of all that this configuration may set, in its ``model.layers`` too."""
    named = pattern.named_options(_group(config, ('model', 'layers')))
    return dict(leaves()) | {f'model.layers.{key}': option for key, option in named.items()}


def free(*configurations: Any) -> frozenset[str]:
    """Keys of all that may change between one start of a run and the next; in ``model.layers``, of any of these."""
    return frozenset(key for config in configurations for key, option in known(config).items() if option.free)


def default() -> ml_collections.ConfigDict:
    """Returns a new configuration in which every option has its default."""

    def build(nodes: Mapping[str, Any]) -> ml_collections.ConfigDict:
        return ml_collections.ConfigDict(
            {name: node.default if isinstance(node, Option) else build(node) for name, node in nodes.items()}
        )

    return build(table())


def load(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Reads an experiment file and applies overrides.

    Args:
      path: ``file.py`` or ``file.py:argument``; the file defines ``get_config(arg=None)``.
      overrides: ``key=value`` with dotted keys, as on the command line without ``--config.``.

    Raises:
      ConfigError: the file is missing or fails, or a key or value is wrong.
    """
    path = expand(path, '--config')
    file = path.split(':')[0]
    if not os.path.isfile(file):
        if os.path.isfile(path) or os.path.isfile(path.rpartition(':')[0]):
            raise ConfigError(f'experiment file {path}: its path must not hold a colon, after which comes its argument')
        raise ConfigError(f'experiment file {file} does not exist; give the path of a Python file with get_config()')
    if not os.access(file, os.R_OK):
        raise ConfigError(f'experiment file {file} cannot be read: permission denied')
    expected = dict(leaves())
    latest = {override.partition('=')[0]: override for override in overrides}  # of one key the last counts
    for key, override in latest.items():
        if '=' not in override:
            raise ConfigError(f'override {override!r} has no value; write {key}=VALUE')
        if not key.startswith(NAMED):
            _require(key, expected)
    if any(key.startswith(NAMED) for key in latest):
        _require_given(load(path), overrides)
    argv = ['mixcon', f'--config={path}', *(f'--config.{_quoted(override, expected)}' for override in latest.values())]
    sys.modules.pop('config_config', None)  # ml_collections runs every file in this one module, leftovers included
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    try:
        values(argv)
        config = values.config
    except UserError:
        raise
    except flags.Error as error:
        line = first_line(error)  # of an override, or of what the file raised when absl takes that for a bad flag
        raise ConfigError(line if '--config.' in line else f'{_place(file, error)}: {line}{_hint(line)}') from error
    except AttributeError as error:
        if error.name == 'get_config' and error.obj is sys.modules.get('config_config'):
            raise ConfigError(f'experiment file {file} has no get_config(arg=None)') from error
        raise ConfigError(f'{_place(file, error)}: AttributeError: {first_line(error)}') from error
    except Exception as error:  # whatever the experiment file itself raises
        raise ConfigError(f'{_place(file, error)}: {type(error).__name__}: {first_line(error)}') from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f'experiment file {path}: get_config() must return a ConfigDict, not {type(config).__name__}')
    return canonical(config)


def mesh_of(overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """``config.mesh`` with these overrides, all else of it at its default: for what was trained on another mesh.

    Args:
      overrides: ``key=value`` as of ``load``, all of them ``mesh.``.

    Raises:
      ConfigError: one is of something else, or a key or value is wrong.
    """
    expected = {key: option for key, option in leaves() if key.startswith('mesh.')}
    config = default()
    for key, separator, text in (override.partition('=') for override in overrides):
        if not key.startswith('mesh.'):
            raise ConfigError(f'override {key}: a checkpoint has its own options; give those of a mesh, as mesh.fsdp')
        if not separator:
            raise ConfigError(f'override {key!r} has no value; write {key}=VALUE')
        _require(key, expected)
        try:
            put(config, key, int(text) if isinstance(expected[key].default, int) else text)
        except ValueError as error:
            raise ConfigError(f'{key}={text} must be a whole number') from error
    return check_each(config).mesh


def _quoted(override: str, expected: Mapping[str, Option]) -> str:
    """The override as ml_collections reads it, texts as a tuple of one, whatever is in it: ``canonical`` splits it."""
    key, _, text = override.partition('=')
    texts = key in expected and expected[key].element is str
    return f'{key}={(text,)!r}' if texts and not text.lstrip().startswith(('(', '[', '"', "'")) else override


def _split(text: str, option: Option) -> tuple[str, ...]:
    return tuple(part.strip() for part in re.split(option.between, text) if part.strip())


def _require_given(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> None:
    """Refuses overrides in ``model.layers`` of what the experiment file does not set: names there are its own."""
    given = [key for key in flatten(config) if key.startswith(NAMED)]
    for key in (override.split('=')[0] for override in overrides):
        if key.startswith(NAMED) and key not in given:
            has = f'it sets {", ".join(given)}' if given else 'it names no layers'
            raise ConfigError(f'override {key}: the experiment file does not set it; {has}')


def _place(file: str, error: BaseException) -> str:
    """The experiment file and, where the error came from it, the line."""
    at: int | None = None
    cause: BaseException | None = error
    while cause is not None:
        for frame, line in traceback.walk_tb(cause.__traceback__):
            at = line if os.path.realpath(frame.f_code.co_filename) == os.path.realpath(file) else at
        cause = cause.__cause__ or cause.__context__
    return f'experiment file {file}' + (f', line {at}' if at else '')


def _hint(line: str) -> str:
    return '; define get_config(arg=None)' if 'get_config() takes 0 positional' in line else ''


def canonical(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a copy with numbers and tuples in their option's type: ``1`` for a float is ``1.0``, ``'a,b'`` splits."""
    values = config.to_dict()  # a plain one: setting a ConfigDict's entries to another type is slow
    for key, option in known(values).items():
        *path, name = key.split('.')
        group = _group(values, path)
        value = group.get(name)
        if isinstance(option.default, float) and type(value) is int:
            group[name] = _float(value)
        elif isinstance(option.default, tuple) and isinstance(value, list | tuple | str):
            items = [value] if isinstance(value, str) else list(value)
            items = [] if items == [''] else items
            if option.element is str and len(items) == 1:  # as the command line gives several
                items = list(_split(str(items[0]), option))
            if option.element is float:
                items = [_float(item) if type(item) is int else item for item in items]
            group[name] = tuple(items)
    return ml_collections.ConfigDict(values)


def _float(value: int) -> float:
    """Of an integer of any size: infinity, which no option may be, where there is no float for it."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _group(values: Any, path: Sequence[str]) -> Any:
    """The dict at a path of nested ones; a new one where there is none."""
    for name in path:
        found = values.get(name)
        values = found if isinstance(found, dict | ml_collections.ConfigDict) else {}
    return values


def get(config: ml_collections.ConfigDict, key: str, *default: Any) -> Any:
    """Returns the value at a dotted key."""
    node: Any = config
    for name in key.split('.'):
        if not isinstance(node, ml_collections.ConfigDict) or name not in node:
            if default:
                return default[0]
            raise ConfigError(f'option {key} is missing; start from mixcon_jax.config.default()')
        node = node[name]
    return node


def put(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
    """Sets the value at a dotted key, whatever its old type was."""
    *path, last = key.split('.')
    node = config
    for name in path:
        node = node[name]
    with node.ignore_type():
        node[last] = value


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns ``{dotted key: value}``."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= {f'{name}.{key}': leaf for key, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Returns ``{dotted key: (old value, new value)}`` wherever the two differ."""
    a, b = flatten(canonical(old)), flatten(canonical(new))
    return {key: (a.get(key), b.get(key)) for key in sorted(a | b) if a.get(key) != b.get(key)}


def to_json(config: ml_collections.ConfigDict) -> str:
    """Returns the configuration as indented JSON; ``model.layers`` only where it names any."""
    values = config.to_dict()
    if not _group(values, ('model', 'layers')):
        _group(values, ('model',)).pop('layers', None)
    return json.dumps(values, indent=2) + '\n'


def from_json(text: str) -> ml_collections.ConfigDict:
    """Reads ``to_json``'s form; options that are newer than the text take their defaults."""
    return from_dict(json.loads(text))


def from_dict(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Reads ``config.to_dict()``'s form, also after a round trip through JSON."""
    config, expected = default().to_dict(), known(values)
    for key, value in flatten(ml_collections.ConfigDict(dict(values))).items():
        _require(key, expected)
        *path, name = key.split('.')
        if key.startswith(NAMED):
            config['model']['layers'].setdefault(path[-1], {})
        _group(config, path)[name] = value
    return canonical(ml_collections.ConfigDict(config))


def read(path: str | Path) -> ml_collections.ConfigDict:
    """Reads a run directory's ``config.json``.

    Raises:
      ConfigError: it is missing, or not what ``to_json`` writes.
    """
    try:
        return from_dict(json_object(Path(path).read_bytes()))
    except (OSError, ValueError) as error:
        raise ConfigError(f'{path} is not a readable configuration: {first_line(error)}') from error


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a copy in which every 0 or () that means "derive it" is spelled out."""
    config = canonical(config)
    config.model = pattern.resolve(config.model)
    config.eval.batch_size = config.eval.batch_size or config.train.batch_size // max(config.train.accum_steps, 1)
    return config


def validate(config: ml_collections.ConfigDict, num_devices: int | None = None) -> ml_collections.ConfigDict:
    """Checks names, types, ranges and divisibility; returns the resolved configuration.

    Args:
      config: what to check; it is not changed.
      num_devices: devices of the whole job; given, the mesh and the batch are checked against it.

    Raises:
      ConfigError: names the key and says what would be right.
    """
    config = check_each(config)
    pattern.check(config.model)
    _check_data(config.data)
    if config.optim.warmup_steps > config.train.steps:
        raise ConfigError(
            f'optim.warmup_steps={config.optim.warmup_steps} exceeds train.steps={config.train.steps};'
            ' warm up for fewer'
        )
    if (noise := config.seed + config.train.seed_noise) > UINT32:
        raise ConfigError(f'seed + train.seed_noise={noise} {beyond(noise, UINT32)}')
    config = resolve(config)
    check_mesh(config, num_devices)
    return config


def check_each(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Checks names, types and ranges, each option by itself; returns what ``canonical`` does. Loads no JAX.

    Raises:
      ConfigError: names the key and says what would be right.
    """
    config = canonical(config)
    expected, given = known(config), flatten(config)
    pattern.check_names(_group(config, ('model', 'layers')))
    for key in given:
        _require(key, expected)
    for key, option in expected.items():
        if not key.startswith(NAMED) or key in given:
            check_leaf(key, get(config, key), option)
    return config


def _check_data(data: ml_collections.ConfigDict) -> None:
    if any(spec.startswith('synthetic:') for spec in data.sources):
        from mixcon_jax.data import synthetic

        try:
            synthetic.check(data)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if data.weights and len(data.weights) != len(data.sources):
        raise ConfigError(
            f'data.weights has {len(data.weights)} numbers for {len(data.sources)} data.sources; give one each, or none'
        )
    if data.weights and (min(data.weights) < 0 or sum(data.weights) <= 0):
        raise ConfigError(f'data.weights={data.weights} must be non-negative with a positive sum')


def check_mesh(config: ml_collections.ConfigDict, num_devices: int | None = None) -> None:
    """Checks what the mesh has to share out and, given their number, that it takes all devices.

    Raises:
      ConfigError: names the key and says what would be right.
    """
    mesh, batch = config.mesh, config.train.batch_size
    divides('train.accum_steps', config.train.accum_steps, 'train.batch_size', batch)
    divides('mesh.context', max(mesh.context, 1), 'data.seq_len', config.data.seq_len)
    found = {axis: mesh[axis] for axis in axes.AXES} if num_devices is None else axes.sizes(mesh, num_devices)
    divides('mesh.context', max(found['context'], 1), 'data.seq_len', config.data.seq_len)
    if found['data'] != -1 and found['fsdp'] != -1:
        axes.across(found, mesh.slices)
    if all(found[axis] != -1 for axis in axes.BATCH_AXES):
        shards = axes.rows(found)
        advice = '' if num_devices is None else f'there are {num_devices} devices; {axes.FEWER}'
        divides(axes.ROWS, shards, 'train.batch_size / train.accum_steps', batch // config.train.accum_steps, advice)
        divides(axes.ROWS, shards, 'eval.batch_size', config.eval.batch_size, advice)
    known = {axis: max(size, 1) for axis, size in found.items()}  # what is left to take is not known yet
    rules, groups = axes.rules(mesh), axes.groups(config.train, known)
    if groups > 1:
        axes.check_groups(rules)
    pattern.check_split(config.model, axes.shards(rules, known, groups))


def _require(key: str, expected: Mapping[str, Option]) -> None:
    """Refuses a key that no option has, with the one that was meant.

    Raises:
      ConfigError: there is none.
    """
    if key in expected:
        return
    if key + '.' == NAMED:
        raise ConfigError(f"{key} holds groups of options by name; write {NAMED}NAME = dict(kind='...', ...)")
    if inside := [name for name in expected if name.startswith(key + '.')]:
        raise ConfigError(f'{key} is a group of options; set one of them, such as {inside[0]}')
    # A key that is right but for its group is more likely meant than one that merely looks alike.
    last = key.split('.')[-1]
    same = [name for name in expected if name.split('.')[-1] == last]
    close = same or difflib.get_close_matches(key, expected, n=1, cutoff=0.0)
    raise ConfigError(f'unknown option {key}; did you mean {close[0]}?')
