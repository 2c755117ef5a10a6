"""A block: the layers of one pattern repeat, each a mixer, a mixer then an FFN, or both in parallel."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from mixcon_jax.errors import ConfigError
from mixcon_jax.models import reported
from mixcon_jax.models.context import Context
from mixcon_jax.models.layer import Layer
from mixcon_jax.models.layers import Aux, Loss, Parameters, State, kept, selective, stream_norm
from mixcon_jax.models.pattern import named_kinds, parse_layer, parts
from mixcon_jax.models.shortcut import AugmentedShortcut
from mixcon_jax.parallel.layout import stream


class Residual(nnx.Module):
    """Pre-norm residual layer: x += mixer(norm x); x += ffn(norm x). In parallel, both read the same normed x.

    With ``shortcut.reduction`` a way around the mixer is part of its step.
    """

    def __init__(self, config, spec: str, params: Parameters, num_layers: int) -> None:
        self.parallel = parse_layer(spec, named_kinds(config)).parallel
        self.mixer_norm = stream_norm(config, params.scope('mixer_norm'))
        made = {
            role: part.load()(part.model, params.scope(role), num_layers) for role, part in parts(config, spec).items()
        }
        self.mixer = made['mixer']
        self.shortcut = AugmentedShortcut(config, params.scope('shortcut')) if config.shortcut.reduction else None
        if 'ffn' in made:
            if not self.parallel:
                self.ffn_norm = stream_norm(config, params.scope('ffn_norm'))
            self.ffn = made['ffn']

    def parts(self) -> dict[str, Layer]:
        """The mixer and, where there is one, the FFN."""
        return {role: getattr(self, role) for role in ('mixer', 'ffn') if hasattr(self, role)}

    def init_state(self, batch: int, max_len: int) -> State:
        return {role: part.init_state(batch, max_len) for role, part in self.parts().items()}

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, dict[str, Aux]]:
        """As of ``Layer``, with the aux of each part by its role.

        Raises:
          ConfigError: a part reports a statistic or a loss under a name that is taken.
        """
        old = {} if state is None else state
        normed = self.mixer_norm(x)
        y, mixer_state, aux = self.mixer(normed, context.fold(0), old.get('mixer'))
        if self.shortcut is not None:
            y = y + self.shortcut(normed)
        new: State = {'mixer': mixer_state}
        auxes = {'mixer': aux}
        x = stream(x + y)
        if hasattr(self, 'ffn'):
            if not self.parallel:
                x = kept(x)
                normed = self.ffn_norm(x)
            y, new['ffn'], auxes['ffn'] = self.ffn(normed, context.fold(1), old.get('ffn'))
            x = stream(x + y)
        for role, part in self.parts().items():
            for kind, key in (('statistic', 'stats'), ('loss', 'losses')):
                for name in auxes[role].get(key, {}):
                    if (why := reported.refused(kind, name)) is not None:
                        raise ConfigError(f'{type(part).__qualname__} reports {why}')
        return x, None if state is None else new, auxes

    def update_buffers(
        self, buffers: Mapping[str, Any], stats: Mapping[str, Mapping[str, Array]]
    ) -> dict[str, Mapping[str, Any]]:
        """The parts' new buffers, all by role; each is shown the statistics that its class declares."""
        parts, new = self.parts(), {}
        for role, values in buffers.items():
            own = _declared(type(parts[role]))
            shown = {name: value for name, value in stats[role].items() if name in own}
            new[role] = parts[role].update_buffers(values, shown)
        return new


def _declared(kind: type[Layer]) -> set[str]:
    """The names of the statistics that a class and its bases declare."""
    return {name for base in kind.__mro__ for name in vars(base).get('STATISTICS', ())}


class Block(nnx.Module):
    """The layers of one pattern repeat; ``index`` (possibly traced) tells which, for the initial values."""

    def __init__(self, config, params: Parameters, index: int | Int[Array, '']) -> None:
        size = len(config.pattern)
        num_layers = size * config.num_blocks
        self.remat = config.remat
        self.layers = nnx.List(
            [
                Residual(config, spec, params.layer(index * size + j), num_layers)
                for j, spec in enumerate(config.pattern)
            ]
        )

    def init_state(self, batch: int, max_len: int) -> list[State]:
        return [layer.init_state(batch, max_len) for layer in self.layers]

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: list[State] | None
    ) -> tuple[Float[Array, 'b t d'], list[State | None] | None, Aux]:
        losses: dict[str, list[Loss]] = {}
        stats: dict[str, Array] = {}
        new: list[State | None] = []
        for j, layer in enumerate(self.layers):
            run: Callable[..., Any] = layer
            if self.remat == 'selective' and state is None:
                # Layer by layer, so that what is computed again is of one layer at a time.
                run = jax.checkpoint(lambda x, context, state, layer=layer: layer(x, context, state), policy=selective)
            x, layer_state, auxes = run(x, context.fold(j), None if state is None else state[j])
            new.append(layer_state)
            for aux in auxes.values():
                for name, loss in aux.get('losses', {}).items():
                    losses.setdefault(name, []).append(loss)
            stats |= reported.statistics(j, {role: aux.get('stats', {}) for role, aux in auxes.items()})
        means = {name: Loss.mean(found) for name, found in losses.items()}
        return x, None if state is None else new, {'losses': means, 'stats': stats}

    def update_buffers(self, buffers: Mapping[str, Any], stats: Mapping[str, Array]) -> dict[str, Any]:
        """The layers' new buffers.

        Args:
          buffers: ``{'layers': {'j': {role: the part's}}}``, of layers that have any.
          stats: by their names in metrics.
        """
        new = {
            j: self.layers[int(j)].update_buffers(values, reported.by_part(int(j), stats))
            for j, values in buffers['layers'].items()
        }
        return {'layers': new}
