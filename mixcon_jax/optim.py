"""Learning-rate schedules and optimizers, with the group of every parameter decided by what it says of itself.

Blocks are stacked: a norm's scale is a matrix ``[layers, embed]`` to anyone who counts dimensions. So groups look at
logical axis names, and at what says that it must not decay, and an update of stacked layers equals the updates of the
layers one by one.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mixcon_jax.options import decaying_steps
from mixcon_jax.trees import Tree, map_named

STACK_AXES = ('layers', 'experts')  # leading, they line up independent arrays
# The sides of the matrices that Muon takes.
WIDE_AXES = ('embed', 'mlp', 'heads', 'kv_heads', 'head_dim', 'inner', 'norm')


class Group(NamedTuple):
    """How a parameter is updated."""

    name: str  # 'muon', or the optimizer's name
    decayed: bool


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------
def schedule(config: ml_collections.ConfigDict, steps: int) -> Callable[[Int[Array, '']], Float[Array, '']]:
    """The learning rate as a fraction of its peak, as a function of the step, counted from 0.

    The warm-up rises linearly and reaches the peak at its last step, ``warmup_steps - 1``; the very last step,
    ``steps - 1``, has ``final_fraction`` (but with a constant schedule). Past the end the last value stays.

    Args:
      config: ``config.optim``.
      steps: length of the run, ``config.train.steps``.
    """
    warmup, final = config.warmup_steps, config.final_fraction
    decay = decaying_steps(config.decay_fraction, steps) if config.schedule == 'wsd' else steps - warmup

    def fraction(step: Int[Array, '']) -> Float[Array, '']:
        done = jnp.asarray(step, jnp.float32) + 1.0
        progress = jnp.clip((done - (steps - decay)) / max(decay, 1.0), 0.0, 1.0)
        match config.schedule:
            case 'cosine':
                shape = final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
            case 'linear' | 'wsd':
                shape = 1.0 + (final - 1.0) * progress
            case 'constant':
                shape = jnp.ones_like(progress)
            case other:
                raise ValueError(f'optim.schedule {other!r} is not cosine, wsd, linear or constant')
        return shape * jnp.minimum(1.0, done / max(warmup, 1))

    return fraction


# ---------------------------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------------------------
def stacked_axes(axes: tuple[str | None, ...]) -> int:
    """How many leading axes line up independent arrays."""
    count = 0
    while count < len(axes) and axes[count] in STACK_AXES:
        count += 1
    return count


def is_matrix(axes: tuple[str | None, ...]) -> bool:
    """Whether a parameter is a weight matrix: the only kind that decays, unless it says that it must not.

    Not among them: what is a vector per layer (norms, biases, skips, scales, kappa); depthwise convolutions and delay
    taps, which are vectors per lag. Of matrices, ``A_log`` must not decay, nor the embedding, of which a batch touches
    few rows while decay would shrink all.
    """
    return len(axes) - stacked_axes(axes) >= 2 and 'conv' not in axes


def muon_dimensions(axes: tuple[str | None, ...]) -> MuonDimensionNumbers | None:
    """Input and output axes of a matrix that Muon orthogonalises; None where AdamW is used.

    Muon takes the projections between wide features: attention, mixer inputs and outputs, MLPs and experts. AdamW
    keeps embedding and head, the router, and narrow projections such as those to dt, B and C or to the gain's rates,
    whose few columns mean different things.
    """
    first = stacked_axes(axes)
    sides = axes[first:]
    if not is_matrix(axes) or not set(sides) <= set(WIDE_AXES):
        return None
    # Heads may come with their width, [embed, heads, head_dim] or [heads, head_dim, embed]; embed is a side by itself.
    split = len(sides) - 1 if sides[-1] == 'embed' else 1
    dims = tuple(range(first, len(axes)))
    return MuonDimensionNumbers(reduction_axis=dims[:split], output_axis=dims[split:])


def describe_groups(
    optimizer: str, logical_axes: Mapping[str, tuple[str | None, ...]], undecayed: Collection[str] = ()
) -> dict[str, Group]:
    """The group of every parameter, by name.

    Args:
      optimizer: ``config.optim.name``.
      logical_axes: axis names of every parameter, as ``trees.logical_axes`` gives them.
      undecayed: names of those that must not decay, as ``trees.undecayed`` gives them; Muon takes none of these.
    """
    groups = {}
    for name, axes in logical_axes.items():
        group, decayed = optimizer, is_matrix(axes) and name not in undecayed
        if optimizer == 'muon':
            group = 'muon' if decayed and muon_dimensions(axes) is not None else 'adamw'
        groups[name] = Group(group, decayed)
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers
# ---------------------------------------------------------------------------------------------------------------------
class Pair(NamedTuple):
    """One parameter's update and new optimizer state."""

    update: Any
    state: Any


def per_matrix(transform: optax.GradientTransformation, stacked: Mapping[str, int]) -> optax.GradientTransformation:
    """Applies ``transform`` to every matrix of a stack on its own.

    Adafactor's factors and clipping look at a whole leaf; here they see one layer's (and expert's) matrix.

    Args:
      transform: what to do with one array.
      stacked: how many leading axes of each parameter, by name, are stacks.
    """

    def lift(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        for _ in range(stacked[name]):
            function = jax.vmap(function)
        return function

    def init(params: Tree) -> Tree:
        return map_named(lambda name, p: lift(transform.init, name)(p), params)

    def update(grads: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        pairs = map_named(lambda name, g, s, p: Pair(*lift(transform.update, name)(g, s, p)), grads, state, params)
        is_pair = lambda x: isinstance(x, Pair)
        first = jax.tree.map(lambda pair: pair.update, pairs, is_leaf=is_pair)
        return first, jax.tree.map(lambda pair: pair.state, pairs, is_leaf=is_pair)

    return optax.GradientTransformation(init, update)


def aspect(x: Float[Array, '...'], dimensions: MuonDimensionNumbers) -> float:
    """Muon's scale of an orthogonal update, sqrt(max(1, outputs / inputs)) (Jordan et al., 2024)."""
    inputs = math.prod(x.shape[axis] for axis in dimensions.reduction_axis)
    outputs = math.prod(x.shape[axis] for axis in dimensions.output_axis)
    return math.sqrt(max(1.0, outputs / inputs))


def make_optimizer(
    config: ml_collections.ConfigDict,
    logical_axes: Mapping[str, tuple[str | None, ...]],
    undecayed: Collection[str] = (),
    rates: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """The optimizer at its peak learning rate; the step multiplies its updates by the schedule's fraction.

    The schedule stays outside because a skipped step leaves the optimizer's state, and so its count, untouched.
    Weight decay is decoupled, multiplied by the learning rate, and falls on weight matrices only. Clipping is the
    step's business too: it needs the norm anyway.

    Args:
      config: ``config.optim``.
      logical_axes: axis names of every parameter.
      undecayed: names of those that must not decay.
      rates: learning rates of some parameters as multiples of the others', as ``trees.rates`` gives them.
    """
    optimizer = _at_one_rate(config, logical_axes, undecayed)
    if not rates:
        return optimizer

    def update(grads: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        updates, state = optimizer.update(grads, state, params)
        return map_named(lambda name, u: rates.get(name, 1.0) * u, updates), state

    return optax.GradientTransformation(optimizer.init, update)  # not a chain: a rate is no part of the state


def _at_one_rate(
    config: ml_collections.ConfigDict, logical_axes: Mapping[str, tuple[str | None, ...]], undecayed: Collection[str]
) -> optax.GradientTransformation:
    """``make_optimizer`` without rates of single parameters."""
    groups = describe_groups(config.name, logical_axes, undecayed)
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda params: map_named(lambda name, _: groups[name].decayed, params)
    )
    b1, b2 = config.betas
    rate = optax.scale_by_learning_rate(config.learning_rate)
    adamw = optax.chain(optax.scale_by_adam(b1=b1, b2=b2, eps=config.eps), decay, rate)
    match config.name:
        case 'adamw':
            return adamw
        case 'lion':
            return optax.chain(optax.scale_by_lion(b1=b1, b2=b2), decay, rate)
        case 'adafactor':
            # The published form: factored second moments, update clipping, step relative to the matrix's own size.
            adafactor = optax.chain(
                optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
            )
            stacked = {name: stacked_axes(axes) for name, axes in logical_axes.items()}
            return optax.chain(per_matrix(adafactor, stacked), decay, rate)
        case 'muon':
            dimensions = {
                name: muon_dimensions(axes) if groups[name].name == 'muon' else None
                for name, axes in logical_axes.items()
            }
            muon = optax.chain(
                scale_by_muon(
                    beta=config.momentum,
                    weight_dimension_numbers=lambda tree: map_named(lambda name, _: dimensions[name], tree),
                ),
                optax.stateless(lambda updates, _: map_named(lambda name, u: aspect(u, dimensions[name]) * u, updates)),
                decay,
                optax.scale_by_learning_rate(config.muon_learning_rate),
            )
            labels = lambda params: map_named(lambda name, _: groups[name].name, params)
            return optax.partition({'muon': muon, 'adamw': adamw}, labels)
        case other:
            raise ValueError(f'optim.name {other!r} is not adamw, muon, lion or adafactor')
