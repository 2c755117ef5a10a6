"""A block: the layers of one pattern repeat, each a mixer, a mixer then an FFN, or both in parallel."""

import difflib
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mixcon_jax.models.context import Context
from mixcon_jax.models.ffns import FFNS
from mixcon_jax.models.layers import Aux, Parameters, RMSNorm, State
from mixcon_jax.models.mixers import MIXERS


class LayerSpec(NamedTuple):
    """One layer of a pattern."""

    mixer: str
    ffn: str  # '' for none
    parallel: bool


def parse_layer(text: str) -> LayerSpec:
    """Reads ``'mixer'``, ``'mixer+ffn'`` or ``'mixer|ffn'``.

    Raises:
      ValueError: an unknown name, with the closest known one.
    """
    parallel = '|' in text
    mixer, separator, ffn = text.partition('|' if parallel else '+')
    _known(mixer, MIXERS, 'mixer', text)
    if separator:
        _known(ffn, FFNS, 'ffn', text)
    return LayerSpec(mixer, ffn, parallel)


def _known(name: str, registry: dict, kind: str, text: str) -> None:
    if name not in registry:
        close = difflib.get_close_matches(name, registry, n=1, cutoff=0.0)[0]
        raise ValueError(
            f'layer {text!r} names an unknown {kind} {name!r}; did you mean {close!r} (of {", ".join(registry)})?'
        )


class Layer(nnx.Module):
    """Pre-norm residual layer: x += mixer(norm x); x += ffn(norm x). In parallel, both read the same normed x."""

    def __init__(self, config, spec: str, params: Parameters, num_layers: int) -> None:
        mixer, ffn, self.parallel = parse_layer(spec)
        self.mixer_norm = RMSNorm(config.dim, params.scope('mixer_norm'), config.norm_eps, axis='embed')
        self.mixer = MIXERS[mixer](config, params.scope('mixer'), num_layers)
        if ffn:
            if not self.parallel:
                self.ffn_norm = RMSNorm(config.dim, params.scope('ffn_norm'), config.norm_eps, axis='embed')
            self.ffn = FFNS[ffn](config, params.scope('ffn'), num_layers)

    def init_state(self, batch: int, max_len: int) -> State:
        parts: dict[str, Any] = {'mixer': self.mixer, 'ffn': getattr(self, 'ffn', None)}
        return {name: part.init_state(batch, max_len) for name, part in parts.items() if part is not None}

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        old = {} if state is None else state
        normed = self.mixer_norm(x)
        y, mixer_state, aux = self.mixer(normed, context.fold(0), old.get('mixer'))
        new: State = {'mixer': mixer_state}
        x = x + y
        if hasattr(self, 'ffn'):
            if not self.parallel:
                normed = self.ffn_norm(x)
            y, new['ffn'], ffn_aux = self.ffn(normed, context.fold(1), old.get('ffn'))
            x = x + y
            aux = {kind: aux.get(kind, {}) | ffn_aux.get(kind, {}) for kind in aux.keys() | ffn_aux.keys()}
        return x, None if state is None else new, aux


class Block(nnx.Module):
    """The layers of one pattern repeat; ``index`` (possibly traced) tells which, for the initial values."""

    def __init__(self, config, params: Parameters, index: int | Int[Array, '']) -> None:
        size = len(config.pattern)
        num_layers = size * config.num_blocks
        self.layers = nnx.List(
            [Layer(config, spec, params.layer(index * size + j), num_layers) for j, spec in enumerate(config.pattern)]
        )

    def init_state(self, batch: int, max_len: int) -> list[State]:
        return [layer.init_state(batch, max_len) for layer in self.layers]

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: list[State] | None
    ) -> tuple[Float[Array, 'b t d'], list[State | None] | None, Aux]:
        losses: dict[str, list[Array]] = {}
        stats: dict[str, Array] = {}
        new: list[State | None] = []
        for j, layer in enumerate(self.layers):
            x, layer_state, aux = layer(x, context.fold(j), None if state is None else state[j])
            new.append(layer_state)
            for name, value in aux.get('losses', {}).items():
                losses.setdefault(name, []).append(value)
            stats |= {f'layer_{j}/{name}': value for name, value in aux.get('stats', {}).items()}
        means = {name: jnp.stack(values).mean() for name, values in losses.items()}
        return x, None if state is None else new, {'losses': means, 'stats': stats}
