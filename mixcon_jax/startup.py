"""What a run sets up, requires and says before its first step."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from mixcon_jax import config as configs
from mixcon_jax import function, parsing
from mixcon_jax.data import Tokenizer
from mixcon_jax.data import tokenizer as tokenizers
from mixcon_jax.errors import UserError
from mixcon_jax.host import processes
from mixcon_jax.host.compilation import keep_compiled, make_cpu_devices
from mixcon_jax.host.paths import expand_folder
from mixcon_jax.models import accounting
from mixcon_jax.optim import schedule
from mixcon_jax.options import THROUGH_TOKENS
from mixcon_jax.parallel.mesh import crossing
from mixcon_jax.parallel.placement import placement
from mixcon_jax.planning import hardware
from mixcon_jax.runs.checkpoints import Meta
from mixcon_jax.runs.fingerprint import fingerprint
from mixcon_jax.runs.run import CHECKPOINTS
from mixcon_jax.runs.weights import load_params
from mixcon_jax.runs.workdir import Workdir, listed, renamed, same_schedule
from mixcon_jax.step import Steps, TrainState, load_params_into, require_same_parameters
from mixcon_jax.trees import Shapes, map_named, named_leaves
from mixcon_jax.units import short

# What may be otherwise in every process. Text may lie elsewhere where it has the same tokens, which are compared.
OWN = ('name', 'log.', 'data.cache_dir', 'data.prefetch', 'data.num_threads', *THROUGH_TOKENS)


def set_up_jax(config: ml_collections.ConfigDict) -> None:
    """What must happen before JAX starts its devices, unless the caller has started them."""
    make_cpu_devices(config.mesh.cpu_devices)
    keep_compiled(config)


def require_vocabulary(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f'the tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size={config.model.vocab_size};'
            f' set it to at least {tokenizer.vocab_size}'
        )


def tokens_of(begun: Mapping[str, Any] | None, config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The token stores that a run goes on with if they are there, whatever has become of the text.

    None before there is a checkpoint, nor where the configuration says other things of the data than the run did: then
    the text is looked at, and ``require_same_data`` judges.

    Args:
      begun: what the newest checkpoint holds besides arrays, if there is one.
      config: the configuration to go on with.
    """
    return () if begun is None or renamed(configs.from_dict(begun['config']), config) else tuple(begun['data'])


def require_same_data(
    meta: Meta, identity: tuple[str, ...], tokenizer: Tokenizer, config: ml_collections.ConfigDict
) -> None:
    """Refuses to go on with other text: the steps to come would not be those of the run."""
    same = tokenizers.from_json(meta.tokenizer).fingerprint == tokenizer.fingerprint
    changed = renamed(configs.from_dict(meta.config), config)
    if changed and not (same and meta.data == identity):
        raise UserError(
            f'checkpoint {meta.step} is of a run of other text or another tokenizer ({listed(changed)}); set these'
            ' back, or take another workdir'
        )
    if not same:
        raise UserError(
            f'the data has another tokenizer than checkpoint {meta.step}: the sources have changed;'
            " restore them, or set data.tokenizer to the workdir's tokenizer.json in a new workdir"
        )
    if meta.data != identity:
        raise UserError(
            f'the data of data.sources has changed since checkpoint {meta.step}; restore it,'
            ' or start a new workdir with train.init_from'
        )


def require_same_options(config: ml_collections.ConfigDict) -> None:
    """Refuses options that are others in one of several processes: each has read its own experiment file.

    Raises:
      UserError: names the process and what differs.
    """
    values = {key: value for key, value in configs.flatten(config).items() if not key.startswith(OWN)}
    _require_same(values, 'give all the same experiment file and options')


def require_same_text(identity: tuple[str, ...], tokenizer: Tokenizer) -> None:
    """Refuses other tokens in one of several processes: each may have found, or prepared, its own.

    Raises:
      UserError: names the process.
    """
    values = {'the tokens': identity, 'the tokenizer': tokenizer.fingerprint}
    _require_same(values, 'give all the same text, such as by a data.cache_dir that they share')


def _require_same(values: dict[str, Any], remedy: str) -> None:
    own = json.loads(json.dumps(values))  # as the others get it
    first = processes.of_first(own)
    other = ', '.join(sorted(key for key in own.keys() | first.keys() if own.get(key) != first.get(key)))
    for index, differs in enumerate(processes.of_each(other)):
        if differs:
            raise UserError(
                f'process {index} has another run to make than process 0; these differ: {differs}; {remedy}'
            )


def with_weights_of(
    source: str,
    known: Mapping[str, Any] | None,
    config: ml_collections.ConfigDict,
    state: TrainState,
    steps: Steps,
    tokenizer: Tokenizer,
    say: Callable[[str], None],
) -> tuple[TrainState, dict[str, Any]]:
    """The state with another run's parameters, and its buffers where the model has the same.

    Args:
      source: ``workdir``, or ``workdir:`` and what ``parsing.step`` reads.
      known: what was returned when this run began with the same source, if it did: then the very same weights are
        taken, though the newest or the best may be others by now.
      config: the run's, resolved.
      state: its own, of which all else stays.
      steps: its steps, which know where its arrays lie.
      tokenizer: its tokenizer, which must be the one that the weights were trained with.
      say: takes a line about the weights, and one about options by which they would compute something else.

    Returns:
      The state, and ``source``, ``step`` and ``fingerprint`` of the weights.
    """
    folder, wanted = weights_named(source)
    known = known if known and known.get('source') == source else None
    layout = named_leaves(steps.abstract_state)

    def shardings(meta: Meta, shapes: Shapes) -> dict[str, Any]:
        """Where the arrays lie that the model has; before anything is read it must have those that are parameters."""
        ours = {name: leaf.shape for name, leaf in layout.items()}
        own = lambda every: {n.removeprefix('params/'): s for n, s in every.items() if n.startswith('params/')}
        require_same_parameters(own(ours), own(shapes))
        return {name: leaf.sharding for name, leaf in layout.items() if shapes.get(name) == leaf.shape}

    again = 'delete the workdir to begin anew from others, or train.init_from=FOLDER:STEP in another one'
    try:
        loaded, meta = load_params(folder, known['step'] if known else wanted, shardings, say)
    except UserError as error:
        if known:
            raise UserError(f'{error}; this run began with it: restore it, or {again}') from error
        raise
    if tokenizers.from_json(meta.tokenizer).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f'train.init_from={source} was trained with another tokenizer; set data.tokenizer to'
            f' {os.path.join(folder, "tokenizer.json")}'
        )
    saved = expand_folder(folder) / CHECKPOINTS / str(meta.step)
    origin = {'source': source, 'step': meta.step, 'fingerprint': fingerprint(loaded['params'], saved)}
    if known and known.get('fingerprint') != origin['fingerprint']:
        raise UserError(
            f'step {meta.step} of {folder} has other weights than those this run began with: restore them, or {again}'
        )
    state = load_params_into(state, loaded['params'])
    buffers = named_leaves(loaded['buffers'])
    own = named_leaves(state.buffers)
    if left := [name for name, value in buffers.items() if name not in own and np.any(np.asarray(value))]:
        say(f'left out, as this model has no such buffers: {", ".join(left)} of {folder}')
    same = lambda name, old: name in buffers and buffers[name].shape == old.shape
    say(f'weights of {folder}, step {meta.step}' + (', as when this run began' if known else ''))
    if others := function.differences(configs.resolve(configs.from_dict(meta.config)), config):
        told = ', '.join(f'{key}={before!r} is {after!r} here' for key, (before, after) in others.items())
        say(f'these weights are of a model that computes something else: {told}')
    state = dataclasses.replace(
        state, buffers=map_named(lambda name, old: buffers[name] if same(name, old) else old, state.buffers)
    )
    return state, origin


def weights_named(source: str) -> tuple[str, int | str | None]:
    """The folder that ``train.init_from`` names, and which of its checkpoints, as ``parsing.step`` has it.

    A folder whose name ends like that is taken for what it is.
    """
    folder, _, which = source.rpartition(':')
    if not folder or os.path.isdir(source):
        return source, None
    try:
        return folder, parsing.step(which)
    except ValueError:  # a name with a colon
        return source, None


def say_extended(
    say: Callable[[str], None], was: ml_collections.ConfigDict, config: ml_collections.ConfigDict, made: int
) -> None:
    """Says what another ``train.steps`` than before means for the learning rate."""
    if was.train.steps == config.train.steps:
        return
    text = f'{was.train.steps} steps become {config.train.steps}: '
    if same_schedule(was, config, made):
        say(text + 'the learning rates so far are those of the longer schedule, and the run is that of one begun so')
        return
    rate = lambda each, step: (
        config.optim.learning_rate * float(schedule(each.optim, each.train.steps)(jnp.int32(step)))
    )
    say(
        text + f'the learning rate of step {made} was {rate(was, made - 1):.3g}, that of step {made + 1} is'
        f' {rate(config, made):.3g}, as {config.optim.schedule} over {config.train.steps} steps has it; the steps so'
        f' far followed the old schedule, so this is not the run that {config.train.steps} steps give from the start'
    )


def peak_flops(config: ml_collections.ConfigDict) -> float | None:
    """Of all devices together."""
    one = config.log.peak_flops or hardware.peak_flops(jax.devices()[0].device_kind)
    return one * jax.device_count() if one else None


def _between(mesh: Mesh) -> str:
    """Which axes of several processes go from one to another, in words."""
    axes = crossing(mesh.devices)
    return f'; between {jax.process_count()} processes: {", ".join(axes)}' if axes else ''


def banner(
    say: Callable[[str], None],
    config: ml_collections.ConfigDict,
    folder: Workdir,
    steps: Steps,
    train_batches: Any,
    heldout: Any,
    tokenizer: Tokenizer,
) -> None:
    model, counts, device = config.model, accounting.parameter_count(config.model), jax.devices()[0]
    axes = ' x '.join(f'{axis} {size}' for axis, size in steps.mesh.shape.items() if size > 1) or 'no axis split'
    tokens = config.train.steps * config.train.batch_size * config.data.seq_len
    say(f'run       {config.name or folder.path.name} in {folder.path}')
    say(f'devices   {jax.device_count()} x {device.device_kind}, {axes}{_between(steps.mesh)}')
    for i, line in enumerate(placement(steps.abstract_state.params, steps.logical_axes, steps.mesh)):
        say(f'{"" if i else "layout":<10}{line}')
    say(f'model     {model.num_blocks} x ({", ".join(model.pattern)})')
    say(
        f'          {counts.total:,} parameters, {counts.active:,} active per token'
        + (f', {counts.added:,} of them added to the layers that they extend' if counts.added else '')
    )
    if train_batches.num_tokens is None:  # a task
        data, epochs = f'made as needed, {heldout.num_tokens:,} answers held out', ''
    else:
        data = f'{train_batches.num_tokens:,} training tokens, {heldout.num_tokens:,} held out'
        epochs = f', {", ".join(short(epoch) for epoch in train_batches.epochs(config.train.steps))} epochs'
    say(f'data      {", ".join(config.data.sources)}: {data}, vocabulary {tokenizer.vocab_size:,}')
    say(
        f'training  {config.train.steps:,} steps of {config.train.batch_size} x {config.data.seq_len} tokens:'
        f' {short(tokens)}{epochs}'
    )
    if peak_flops(config) is None:
        say(f'          no MFU: the peak of {device.device_kind!r} is not known; set log.peak_flops')
