"""Configurations: ``default()`` to start from, ``load()`` an experiment file, ``validate()`` before anything compiles.

The options themselves, each with its default and meaning, stand in ``mixcon_jax.options``.
"""

import difflib
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from mixcon_jax.errors import UserError
from mixcon_jax.host.paths import expand, foreign
from mixcon_jax.options import OPTIONS, UINT32, Option, beyond, float32, leaves
from mixcon_jax.parsing import json_object


class ConfigError(UserError):
    """A configuration that cannot run; the message is one line and names the key."""


def default() -> ml_collections.ConfigDict:
    """Returns a new configuration in which every option has its default."""

    def build(options: Mapping[str, Any]) -> ml_collections.ConfigDict:
        return ml_collections.ConfigDict(
            {name: node.default if isinstance(node, Option) else build(node) for name, node in options.items()}
        )

    return build(OPTIONS)


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
        raise ConfigError(f'experiment file {file} does not exist; give the path of a Python file with get_config()')
    for override in overrides:
        key = override.split('=')[0]
        if '=' not in override:
            raise ConfigError(f'override {override!r} has no value; write {key}=VALUE')
        _option(key)
    argv = ['mixcon', f'--config={path}', *(f'--config.{override}' for override in overrides)]
    sys.modules.pop('config_config', None)  # ml_collections runs every file in this one module, leftovers included
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    try:
        values(argv)
        config = values.config
    except UserError:
        raise
    except flags.Error as error:
        line = _first_line(error)  # of an override, or of what the file raised when absl takes that for a bad flag
        raise ConfigError(line if '--config.' in line else f'{_place(file, error)}: {line}{_hint(line)}') from error
    except AttributeError as error:
        if error.name == 'get_config' and error.obj is sys.modules.get('config_config'):
            raise ConfigError(f'experiment file {file} has no get_config(arg=None)') from error
        raise ConfigError(f'{_place(file, error)}: AttributeError: {_first_line(error)}') from error
    except Exception as error:  # whatever the experiment file itself raises
        raise ConfigError(f'{_place(file, error)}: {type(error).__name__}: {_first_line(error)}') from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f'experiment file {path}: get_config() must return a ConfigDict, not {type(config).__name__}')
    return canonical(_with_elements(config, [override.split('=')[0] for override in overrides]))


def _with_elements(config: ml_collections.ConfigDict, overridden: Sequence[str]) -> ml_collections.ConfigDict:
    """Splits tuples of text that the command line gave as one element; those of an experiment file are as they are."""
    for key in overridden:
        value, option = get(config, key, None), _option(key)
        if option.element is str and isinstance(value, tuple) and len(value) == 1:
            put(config, key, _split(str(value[0]), option))
    return config


def _split(text: str, option: Option) -> tuple[str, ...]:
    return tuple(part.strip() for part in re.split(option.between, text) if part.strip())


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
    for key, option in leaves():
        *path, name = key.split('.')
        group = _group(values, path)
        value = group.get(name)
        if isinstance(option.default, float) and type(value) is int:
            group[name] = _float(value)
        elif isinstance(option.default, tuple) and isinstance(value, list | tuple | str):
            items = list(_split(value, option) if isinstance(value, str) else value)
            items = [] if items == [''] else items
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


def _group(values: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The dict at a path of nested ones; a new one where there is none."""
    for name in path:
        found = values.get(name)
        values = found if isinstance(found, dict) else {}
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
    """Returns the resolved configuration as indented JSON."""
    return json.dumps(config.to_dict(), indent=2) + '\n'


def from_json(text: str) -> ml_collections.ConfigDict:
    """Reads ``to_json``'s form; options that are newer than the text take their defaults."""
    return from_dict(json.loads(text))


def from_dict(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Reads ``config.to_dict()``'s form, also after a round trip through JSON."""
    config = default().to_dict()
    for key, value in flatten(ml_collections.ConfigDict(dict(values))).items():
        _option(key)
        *path, name = key.split('.')
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
        raise ConfigError(f'{path} is not a readable configuration: {_first_line(error)}') from error


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a copy in which every 0 that means "derive it" is spelled out."""
    config = canonical(config)
    model = config.model
    model.attention.head_dim = model.attention.head_dim or model.dim // model.attention.num_heads
    model.ssm.dt_rank = model.ssm.dt_rank or -(-model.dim // 16)
    model.mlp.hidden_dim = model.mlp.hidden_dim or -(-8 * model.dim // 48) * 16
    model.moe.hidden_dim = model.moe.hidden_dim or max(1, model.mlp.hidden_dim // model.moe.top_k)
    config.eval.batch_size = config.eval.batch_size or config.train.batch_size
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
    _check_model(config.model)
    _check_data(config.data)
    if config.optim.warmup_steps > config.train.steps:
        raise ConfigError(
            f'optim.warmup_steps={config.optim.warmup_steps} exceeds train.steps={config.train.steps};'
            ' warm up for fewer'
        )
    if (noise := config.seed + config.train.seed_noise) > UINT32:
        raise ConfigError(f'seed + train.seed_noise={noise} {beyond(noise, UINT32)}')
    _check_mesh(config, num_devices)
    return resolve(config)


def check_each(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Checks names, types and ranges, each option by itself; returns what ``canonical`` does. Loads no JAX.

    Raises:
      ConfigError: names the key and says what would be right.
    """
    config = canonical(config)
    for key in flatten(config):
        _option(key)
    for key, option in leaves():
        _check_leaf(key, get(config, key), option)
    return config


def _check_leaf(key: str, value: Any, option: Option) -> None:
    expected = type(option.default)
    if type(value) is not expected:
        raise ConfigError(f'{key}={value!r} is a {type(value).__name__}; it must be a {expected.__name__}')
    items = value if option.element is not None else (value,)
    for item in items:
        if option.element is not None and type(item) is not option.element:
            raise ConfigError(f'{key}={value!r}: its elements must be {option.element.__name__}s')
        if isinstance(item, int | float) and (words := beyond(item, option.most)):
            raise ConfigError(f'{key}={item!r} {words}')
        if isinstance(item, str):
            _check_text(key, item)
    if option.path and not value.strip() and value != option.default:
        raise ConfigError(f'{key}={value!r} is empty; name {option.path}')
    if option.check is None:
        return
    if not option.check.holds(value):
        raise ConfigError(f'{key}={value!r} must be {option.check.words}')
    rounded = [float32(item) if isinstance(item, float) else item for item in items]
    if not option.check.holds(tuple(rounded) if option.element is not None else rounded[0]):
        shown = rounded if option.element is not None else rounded[0]
        raise ConfigError(f'{key}={value!r} is {shown} in float32 and must be {option.check.words}')


def _check_text(key: str, text: str) -> None:
    if (found := foreign(text)) is not None:
        raise ConfigError(f'{key}={found!r} is not UTF-8; give it in UTF-8')
    if '\0' in text:
        raise ConfigError(f'{key}={text!r} holds a NUL character')


def _check_model(model: ml_collections.ConfigDict) -> None:
    from mixcon_jax.models.block import parse_layer

    for layer in model.pattern:
        try:
            mixer, ffn, _ = parse_layer(layer)
        except ValueError as error:
            raise ConfigError(f'model.pattern: {error}') from error
        if mixer.startswith('conba') and model.conba.control != 'none':
            _divides('model.conba.head_dim', model.conba.head_dim, 'the inner width', model.ssm.expand * model.dim)
        if mixer == 'attention':
            _divides('model.attention.num_kv_heads', model.attention.num_kv_heads,
                     'model.attention.num_heads', model.attention.num_heads)  # fmt: skip
            if not model.attention.head_dim:
                _divides('model.attention.num_heads', model.attention.num_heads, 'model.dim', model.dim)
            head_dim = model.attention.head_dim or model.dim // model.attention.num_heads
            if model.attention.rope and head_dim % 2:
                raise ConfigError(f'model.attention.head_dim={head_dim} must be even when model.attention.rope is on')
        if ffn == 'moe' and model.moe.top_k > model.moe.num_experts:
            raise ConfigError(
                f'model.moe.top_k={model.moe.top_k} exceeds model.moe.num_experts={model.moe.num_experts};'
                ' choose at most all'
            )
    if model.ssm.dt_min > model.ssm.dt_max:
        raise ConfigError(f'model.ssm.dt_min={model.ssm.dt_min} exceeds model.ssm.dt_max={model.ssm.dt_max}')
    if model.conba.feedback_iters and model.conba.control == 'none':
        raise ConfigError(
            f'model.conba.feedback_iters={model.conba.feedback_iters} feeds back a gain; choose a model.conba.control'
        )


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


def _check_mesh(config: ml_collections.ConfigDict, num_devices: int | None) -> None:
    mesh, batch = config.mesh, config.train.batch_size
    _divides('train.accum_steps', config.train.accum_steps, 'train.batch_size', batch)
    _divides('mesh.context', mesh.context, 'data.seq_len', config.data.seq_len)
    for axis in ('expert', 'tensor'):
        if mesh[axis] != 1:
            raise ConfigError(
                f'mesh.{axis}={mesh[axis]} is not supported yet; use 1 and spread over data, fsdp or context'
            )
    data = mesh.data
    if num_devices is not None:
        rest = mesh.fsdp * mesh.expert * mesh.context * mesh.tensor
        if data == -1:
            _divides('the product of mesh.fsdp, expert, context and tensor', rest, 'the number of devices', num_devices)
            data = num_devices // rest
        if data * rest != num_devices:
            raise ConfigError(
                f'the mesh takes {data * rest} devices (mesh.data={data}, mesh.fsdp={mesh.fsdp},'
                f' mesh.context={mesh.context}),'
                f' but there are {num_devices}'
            )
    if data != -1:
        shards = data * mesh.fsdp
        _divides(
            'mesh.data x mesh.fsdp', shards, 'train.batch_size / train.accum_steps', batch // config.train.accum_steps
        )
        _divides('mesh.data x mesh.fsdp', shards, 'eval.batch_size', config.eval.batch_size or batch)


def _divides(name: str, value: int, whole_name: str, whole: int) -> None:
    if whole % value:
        raise ConfigError(f'{name}={value} must divide {whole_name}={whole}')


def _option(key: str) -> Option:
    known = dict(leaves())
    if key in known:
        return known[key]
    inside = [name for name in known if name.startswith(key + '.')]
    if inside:
        raise ConfigError(f'{key} is a group of options; set one of them, such as {inside[0]}')
    # A key that is right but for its group is more likely meant than one that merely looks alike.
    last = key.split('.')[-1]
    same = [name for name in known if name.split('.')[-1] == last]
    close = same or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    raise ConfigError(f'unknown option {key}; did you mean {close[0]}?')


def _first_line(error: BaseException) -> str:
    """The message in one line; where the first only announces what follows, the last."""
    lines = (str(error) or type(error).__name__).strip().splitlines()
    return lines[-1].strip() if lines[0].endswith(':') else lines[0]
