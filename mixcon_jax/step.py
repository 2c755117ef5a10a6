"""The training and evaluation steps: pure functions of state and batch, jitted once.

``make_steps`` ties them to a configuration and a mesh. The functions below it are the mathematics: the loss of a
microbatch, its sum over microbatches, one update, one evaluation.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from mixcon_jax import optim
from mixcon_jax.errors import UserError
from mixcon_jax.loss import cross_entropy
from mixcon_jax.models import decoder
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Buffer
from mixcon_jax.parallel import apart, axes, layout, magnitude
from mixcon_jax.parallel.rules import on_mesh
from mixcon_jax.trees import Shapes, Tree, from_state, logical_axes, map_named, named_leaves, rates, to_state, undecayed
from mixcon_jax.xla_flags import compiler_options

# What a step takes of a batch, with the types: arrays [B, T].
BATCH = {'tokens': 'int32', 'targets': 'int32', 'loss_mask': 'bool', 'segment_ids': 'int32', 'positions': 'int32'}
BATCH_KEYS = tuple(BATCH)

Model = Any  # an nnx.Module called like models.decoder.Decoder, with its head() and update_buffers()
Batch = Mapping[str, Array]
Metrics = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step: arrays, or in their place shapes or shardings.

    Attributes:
      step: int32, steps taken, skipped ones included: the number of batches consumed, and the schedule's clock.
      params: trained parameters, float32, nested dicts (see trees.py).
      buffers: untrained state of the model (routing biases), nested dicts; empty when there is none.
      opt_state: the optimizer's.
      bad_steps: int32, consecutive steps, up to now, whose loss or gradient was not finite.
      skipped: int32, all such steps so far.
    """

    step: Any
    params: Tree
    buffers: Tree
    opt_state: Tree
    bad_steps: Any
    skipped: Any


@dataclasses.dataclass(frozen=True)
class Steps:
    """The compiled steps of one configuration on one mesh, and what others need to hold their arguments.

    Attributes:
      mesh: the device mesh.
      graphdef: the model's structure; with a state, ``model(state)`` puts it together.
      abstract_state: the TrainState's shapes, types and shardings, to restore checkpoints into.
      logical_axes: axis names of every parameter, by name.
      groups: optimizer group and decay of every parameter, by name.
      init_state: makes the state of step 0, each device only its own part; the same on every mesh.
      train_step: ``(state, batch) -> (state, metrics)``, jitted; the old state's buffers are reused.
      eval_step: ``(state, batch) -> {'nll', 'correct', 'tokens'}``, jitted: sums over the scored tokens.
      put: makes a global batch on the devices from this process's rows, ``layout.own_rows``.
      model: ``state -> Decoder`` with the state's parameters.
    """

    mesh: Mesh
    graphdef: nnx.GraphDef
    abstract_state: TrainState
    logical_axes: dict[str, tuple[str | None, ...]]
    groups: dict[str, optim.Group]
    init_state: Callable[[], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    eval_step: Callable[[TrainState, Batch], dict[str, Array]]
    put: Callable[[Mapping[str, np.ndarray]], dict[str, Array]]
    model: Callable[[TrainState], Model]


def make_steps(config: ml_collections.ConfigDict, mesh: Mesh, create: Callable[..., Model] = decoder.create) -> Steps:
    """Builds the steps of a whole configuration.

    Args:
      config: the experiment, validated for the mesh's devices: ``config.check_mesh`` says whether its batches split.
      mesh: from ``parallel.mesh.make_mesh``.
      create: ``(config.model, seed) -> model``, the Decoder unless a test wants another.
    """
    # ----- the model, taken apart: structure, parameters, buffers -----
    abstract_model = nnx.eval_shape(lambda: create(config.model, config.seed))
    graphdef, *templates = nnx.split(abstract_model, nnx.Param, Buffer)
    param_template, buffer_template = templates
    names, kept = logical_axes(param_template), undecayed(param_template)
    optimizer = optim.make_optimizer(config.optim, names, kept, rates(param_template))

    def build(params: Tree, buffers: Tree) -> Model:
        return nnx.merge(graphdef, to_state(params, param_template), to_state(buffers, buffer_template))

    def init_state() -> TrainState:
        _, *states = nnx.split(create(config.model, config.seed), nnx.Param, Buffer)
        params, buffers = map(from_state, states)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, buffers, optimizer.init(params), zero, zero)

    # ----- where everything lies -----
    abstract, rules = jax.eval_shape(init_state), axes.rules(config.mesh)
    everywhere, by_row = layout.replicated(mesh), layout.batch_sharding(mesh)
    param_shardings = layout.param_shardings(abstract.params, names, mesh, rules)
    param_specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings)
    shardings = dataclasses.replace(
        jax.tree.map(lambda _: everywhere, abstract),
        params=param_shardings,
        opt_state=layout.opt_state_shardings(abstract.opt_state, abstract.params, param_shardings, mesh),
    )

    # XLA:CPU spends many seconds optimizing random-number code that runs once, and what its vectorizer makes of an
    # array depends on how the array is split: unoptimized, initial values are the same on every mesh, bit for bit.
    on_cpu = mesh.devices.flat[0].platform == 'cpu'
    init_options = {'xla_backend_optimization_level': 0} if on_cpu else None

    # ----- the steps -----
    schedule = optim.schedule(config.optim, config.train.steps)

    def train(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with on_mesh(mesh, rules):
            return train_step(config, build, optimizer, schedule, param_specs, state, batch)

    def evaluate(state: TrainState, batch: Batch) -> dict[str, Array]:
        with on_mesh(mesh, rules):
            return eval_step(config, build(state.params, state.buffers), batch)

    def put(batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        return layout.place_rows({key: batch[key] for key in BATCH_KEYS}, mesh)

    return Steps(
        mesh=mesh,
        graphdef=graphdef,
        abstract_state=jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        ),
        logical_axes=names,
        groups=optim.describe_groups(config.optim.name, names, kept),
        init_state=jax.jit(init_state, out_shardings=shardings, compiler_options=init_options),
        train_step=jax.jit(
            train,
            in_shardings=(shardings, by_row),
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
            compiler_options=compiler_options(config.train.deterministic, config.train.xla_flags, mesh.devices.flat[0]),
        ),
        eval_step=jax.jit(evaluate, in_shardings=(shardings, by_row), out_shardings=everywhere),
        put=put,
        model=lambda state: build(state.params, state.buffers),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------
def microbatch_loss(
    config: ml_collections.ConfigDict,
    model: Model,
    batch: Batch,
    rng: Array,
    tokens: Float[Array, ''],
) -> tuple[Float[Array, ''], Metrics]:
    """A microbatch's part of the step's loss: the sum over microbatches is the loss, and so with the metrics.

    Args:
      tokens: number of scored tokens in the whole step, all microbatches and processes together.

    Returns:
      The loss to differentiate, in nats per token plus weighted auxiliary losses, and metrics: ``loss`` (the
      cross-entropy alone), ``z_loss``, ``accuracy``, the auxiliary losses unweighted, and the model's ``stats``.
    """
    context = Context(batch['segment_ids'], batch['positions'], rng=rng, train=True)
    hidden, _, aux = model(batch['tokens'], context)
    sums = cross_entropy(
        hidden,
        model.head(),
        batch['targets'],
        batch['loss_mask'],
        chunk=config.train.loss_chunk,
        z_coef=config.train.z_loss_coef,
    )
    part = 1.0 / (config.train.accum_steps * apart.groups())
    losses = {name: loss.value * part for name, loss in aux['losses'].items()}
    loss = sums.total / tokens + sum(aux['losses'][name].weight * value for name, value in losses.items())
    stats = jax.tree.map(lambda value: value * part, aux['stats'])
    means = {'loss': sums.nll / tokens, 'z_loss': sums.z / tokens, 'accuracy': sums.correct / tokens}
    return loss, losses | means | {'stats': stats}


def accumulate(function: Callable[[Batch, Array], Tree], batch: Batch, accum_steps: int) -> Tree:
    """The sum of ``function(microbatch, its index)`` over the microbatches of a batch.

    Microbatch i holds rows i, i + accum_steps, ...: every device cuts its own rows, none move.
    """
    split = {
        key: layout.constrain(jnp.moveaxis(x.reshape(-1, accum_steps, *x.shape[1:]), 1, 0), None, 'batch', 'sequence')
        for key, x in batch.items()
    }
    if accum_steps == 1:
        return function({key: x[0] for key, x in split.items()}, jnp.zeros((), jnp.int32))

    traced = jax.jit(function, inline=True)  # once, for the shapes and for the loop

    def body(total: Tree, xs: tuple[Batch, Array]) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, total, traced(*xs)), None

    xs = (split, jnp.arange(accum_steps, dtype=jnp.int32))
    shapes = jax.eval_shape(traced, *jax.tree.map(lambda x: x[0], xs))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, zeros, xs)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------
def train_step(
    config: ml_collections.ConfigDict,
    build: Callable[[Tree, Tree], Model],
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Array],
    param_specs: Tree,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """One update, or none when loss or gradient are not finite.

    A skipped step still counts in ``step``, since its batch is spent and the schedule goes on; parameters, buffers and
    the optimizer's state, its own count included, stay as they were.

    Returns:
      The new state, and metrics: ``loss`` (nats per token, without auxiliary terms), ``z_loss``, ``accuracy``
      (share of scored tokens predicted right), the layers' losses, as ``balance`` and ``router_z`` of experts (all
      unweighted),
      ``grad_norm`` (before clipping), ``learning_rate``, ``tokens`` (all that are no padding), ``bad``, ``bad_steps``,
      ``skipped``, ``broken`` (whether the new parameters are not finite, as with options that float32 cannot hold; the
      optimizer's moments overflow only where the gradient's norm does), and ``stats``, the model's own.
    """
    key = jax.random.fold_in(jax.random.key(config.seed + config.train.seed_noise), state.step)
    tokens = jnp.sum(batch['loss_mask'], dtype=jnp.int32)
    divisor = jnp.maximum(tokens, 1).astype(jnp.float32)

    # ----- gradients -----
    def over_microbatches(
        batch: Batch, params: Tree, buffers: Tree, key: Array, divisor: Array
    ) -> tuple[Array, Metrics, Tree]:
        def gradients(microbatch: Batch, index: Array) -> tuple[Array, Metrics, Tree]:
            def loss(params: Tree) -> tuple[Array, Metrics]:
                model = build(params, buffers)
                return microbatch_loss(config, model, microbatch, jax.random.fold_in(key, index), divisor)

            (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
            return value, metrics, jax.lax.with_sharding_constraint(grads, param_specs)

        return accumulate(gradients, batch, config.train.accum_steps)

    groups = axes.groups(config.train, jax.sharding.get_abstract_mesh().shape)
    gradients_of = functools.partial(apart.summed, over_microbatches) if groups > 1 else over_microbatches
    loss, metrics, grads = gradients_of(batch, state.params, state.buffers, key, divisor)

    # ----- update -----
    grad_norm = magnitude.norm(grads, param_specs)
    if config.optim.clip_norm:
        factor = config.optim.clip_norm / jnp.maximum(grad_norm, config.optim.clip_norm)
        grads = jax.tree.map(lambda g: g * factor, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    rate = schedule(state.step)
    params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
    buffers = build(state.params, state.buffers).update_buffers(state.buffers, metrics['stats'])

    # ----- unless it went wrong -----
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    keep = lambda old, new: jax.tree.map(lambda o, n: jnp.where(bad, o, n), old, new)
    state = TrainState(
        step=state.step + 1,
        params=keep(state.params, params),
        buffers=keep(state.buffers, buffers),
        opt_state=keep(state.opt_state, opt_state),
        bad_steps=jnp.where(bad, state.bad_steps + 1, 0),
        skipped=state.skipped + bad,
    )
    whole = jax.tree.map(lambda _: PartitionSpec(), state.buffers)
    metrics |= {
        'grad_norm': grad_norm,
        'learning_rate': config.optim.learning_rate * rate,
        'tokens': jnp.sum(batch['segment_ids'] > 0, dtype=jnp.int32),
        'bad': bad,
        'bad_steps': state.bad_steps,
        'skipped': state.skipped,
        'broken': ~magnitude.all_finite((state.params, state.buffers), (param_specs, whole)),
    }
    return state, metrics


def eval_step(config: ml_collections.ConfigDict, model: Model, batch: Batch) -> dict[str, Array]:
    """Sums over a batch's scored tokens: ``nll`` in nats, those predicted right, ``correct``, and all, ``tokens``."""
    batch = {key: layout.constrain(x, 'batch', 'sequence') for key, x in batch.items()}
    context = Context(batch['segment_ids'], batch['positions'], train=False)
    hidden, _, _ = model(batch['tokens'], context)
    mask = batch['loss_mask']
    sums = cross_entropy(hidden, model.head(), batch['targets'], mask, chunk=config.train.loss_chunk)
    return {'nll': sums.nll, 'correct': sums.correct, 'tokens': jnp.sum(mask, dtype=jnp.int32)}


def load_params_into(state: TrainState, params: Tree) -> TrainState:
    """The state with other parameters, laid out like its own; all else stays.

    Raises:
      UserError: a parameter is missing, unexpected or of another shape; the first such is named.
    """
    ours, theirs = named_leaves(state.params), named_leaves(params)
    require_same_parameters(*({name: leaf.shape for name, leaf in each.items()} for each in (ours, theirs)))
    place = lambda name, old: jax.device_put(jnp.asarray(theirs[name], old.dtype), old.sharding)
    return dataclasses.replace(state, params=map_named(place, state.params))


def require_same_parameters(ours: Shapes, theirs: Shapes) -> None:
    """Refuses loaded weights that are not a model's own.

    Args:
      ours: shapes of the model's parameters, by name.
      theirs: shapes of the loaded ones.

    Raises:
      UserError: a parameter is missing, unexpected or of another shape; the first such is named.
    """
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            raise UserError(f'the model has a parameter {name} that the loaded weights lack; use their model config')
        if name not in ours:
            raise UserError(f'the loaded weights have a parameter {name} that the model lacks; use their model config')
        if ours[name] != theirs[name]:
            raise UserError(
                f'parameter {name} has shape {theirs[name]} in the loaded weights but {ours[name]} in the model;'
                ' use their model config'
            )
