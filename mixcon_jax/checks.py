"""Checks of a configuration that its parts share: each refuses in one line that names the key.

Free of JAX, as are ``mixcon_jax.options`` and this: what a layer says of its options is read without running its file.
"""

from collections.abc import Mapping
from typing import Any

from mixcon_jax.errors import ConfigError
from mixcon_jax.host.paths import foreign
from mixcon_jax.options import Option, beyond, float32

__all__ = ['ConfigError', 'at_most', 'check_leaf', 'divides', 'not_apart']


def divides(name: str, value: int, whole_name: str, whole: int, advice: str = '') -> None:
    """Refuses a value that does not divide the whole; the advice ends the line."""
    if whole % value:
        raise ConfigError(f'{name}={value} must divide {whole_name}={whole}' + (f'; {advice}' if advice else ''))


def at_most(name: str, value: float, limit_name: str, limit: float, advice: str = '') -> None:
    """Refuses a value above the limit, which is another option's; the advice ends the line."""
    if value > limit:
        raise ConfigError(f'{name}={value} exceeds {limit_name}={limit}' + (f'; {advice}' if advice else ''))


def not_apart(shards: Mapping[str, int], name: str, value: float) -> None:
    """Refuses a value other than 0 of what takes all rows of a microbatch at once, where devices compute apart."""
    if value and shards['apart'] > 1:
        raise ConfigError(
            f"{name}={value} takes all rows of a microbatch at once, which train.sum_gradients='step' computes apart;"
            f' set {name}=0, or train.sum_gradients=microbatch'
        )


def check_leaf(key: str, value: Any, option: Option) -> None:
    """Refuses a value of another type, one that 32 bits cannot hold, and what the option's own check does not take."""
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
