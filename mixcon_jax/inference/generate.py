"""Sampling from a model: prefill a batch of prompts, then decode token by token with state of constant size."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mixcon_jax.errors import UserError
from mixcon_jax.host.paths import foreign
from mixcon_jax.inference.load import load_model
from mixcon_jax.models.context import Context
from mixcon_jax.models.decoder import Decoder
from mixcon_jax.models.layers import State
from mixcon_jax.options import beyond
from mixcon_jax.parallel import axes, layout
from mixcon_jax.parallel.rules import Place


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: keep only the k likeliest tokens; 0 keeps all.
      top_p: keep the fewest tokens whose probabilities reach p; 1 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f'temperature={self.temperature} must be at least 0 (0 is greedy)')
        if self.top_k < 0:
            raise UserError(f'top_k={self.top_k} must be at least 0 (0 keeps every token)')
        if not 0 < self.top_p <= 1:
            raise UserError(f'top_p={self.top_p} must be greater than 0 and at most 1')
        for name, value in dataclasses.asdict(self).items():
            if words := beyond(value):
                raise UserError(f'{name}={value} {words}')


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    vocab_size: int,
    place: Place | None = None,
    length: int = 0,
) -> Iterator[Int[np.ndarray, 'b']]:
    """Yields one new token of every prompt at a time, -1 where its scores are not finite.

    Prompts may differ in length: shorter ones are padded on the left, and every layer leaves padding out of its
    states, so that each prompt gets the tokens it would get alone.

    Args:
      model: the decoder.
      prompts: token ids of each prompt, at least one each (a document's start is the end-of-text token).
      max_new_tokens: tokens to decode.
      sampling: temperature and filters.
      seeds: one a prompt; a prompt's draws depend on its seed and its own tokens alone.
      vocab_size: ids from here on are padding of the embedding and never drawn.
      place: the mesh that the model's parameters lie on; rows are shared out if it divides them.
      length: tokens to which prompts are padded at least, so that prompts of several lengths are compiled for once.

    Raises:
      UserError: an empty prompt or an id outside the vocabulary.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise UserError('a prompt has no tokens; give at least the end-of-text token')
    if max(map(max, prompts)) >= vocab_size or min(map(min, prompts)) < 0:
        raise UserError(f'a prompt has token ids outside the vocabulary of {vocab_size}')
    tokens, positions = left_padded(prompts, length)
    graphdef, variables = nnx.split(model)
    state = _first_state(graphdef, variables, len(prompts), tokens.shape[1] + max_new_tokens, place)
    # What the step takes from the host is in NumPy, which of several processes means the same on all.
    draws = np.asarray(seeds, np.uint32)
    step = functools.partial(_step, graphdef, sampling, vocab_size, variables, draws, place=place)
    next_token, state = step(tokens, positions, state, np.int32(0))
    for i in range(1, max_new_tokens + 1):
        yield np.asarray(next_token)
        if i < max_new_tokens:
            next_token, state = step(next_token[:, None], positions[:, -1:] + np.int32(i), state, np.int32(i))


def generate_text(
    workdir: str | Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    num_samples: int,
    sampling: Sampling,
    seed: int,
    step: int | str | None = None,
    out: TextIO | None = None,
    mesh: Sequence[str] = (),
) -> list[str]:
    """Continues prompts with a run's checkpoint, streaming a single one, or printing several at the end.

    Every prompt starts a document. A sample ends at the end-of-text token or after ``max_new_tokens``.

    Args:
      workdir: a run directory.
      prompts: texts, possibly empty.
      max_new_tokens: tokens to generate at most.
      num_samples: samples of each prompt; sample i draws with ``seed + i``.
      sampling: how tokens are chosen.
      seed: first seed.
      step: a checkpoint's step, ``'best'`` or None for the newest.
      out: where to write; the terminal by default.
      mesh: overrides of ``load_model``: tokens are those of one device, but where rounding decides.

    Returns:
      The texts, prompt included, sample after sample of each prompt.

    Raises:
      UserError: the seed is out of range, a prompt is not UTF-8, there is no such checkpoint, or the mesh does not
        fit; at the end, if scores of a sample were not finite.
    """
    if not 0 <= seed <= 2**32 - num_samples:
        raise UserError(f'seed={seed} must be between 0 and {2**32 - num_samples}')
    for prompt in prompts:
        if (found := foreign(prompt)) is not None:
            raise UserError(f'the prompt {found!r} is not UTF-8; give it in UTF-8')
    out = out or sys.stdout
    trained = load_model(workdir, step, mesh)
    tokenizer = trained.tokenizer
    rows = [(prompt, sample) for prompt in prompts for sample in range(num_samples)]
    ids = [[tokenizer.eot_id, *tokenizer.encode(prompt)] for prompt, _ in rows]
    decoders = [tokenizer.stream(after=row[1:]) for row in ids]
    texts, live = [prompt for prompt, _ in rows], [True] * len(rows)
    broken: list[int] = []
    streaming = len(rows) == 1
    if streaming:
        print(texts[0], end='', file=out, flush=True)

    def extend(row: int, piece: str) -> None:
        texts[row] += piece
        if streaming:
            print(piece, end='', file=out, flush=True)

    seeds = [seed + sample for _, sample in rows]
    for tokens in generate(trained.model, ids, max_new_tokens, sampling, seeds, tokenizer.vocab_size, trained.place):
        for row, token in enumerate(tokens.tolist()):
            if live[row] and token < 0:
                broken.append(row + 1)
            live[row] = live[row] and token not in (tokenizer.eot_id, -1)
            if live[row]:
                extend(row, decoders[row].push(token))
        if not any(live):
            break
    for row, decoder in enumerate(decoders):
        extend(row, decoder.flush())
    if streaming:
        print(file=out)
    else:
        for row, text in enumerate(texts):
            print(f'--- {row + 1} of {len(texts)}\n{text}', file=out)
    if broken:
        which = f' of sample {", ".join(map(str, broken))}' if len(rows) > 1 else ''
        raise UserError(f'the scores of the next token{which} are not finite: nothing can be drawn by these weights')
    return texts


def left_padded(
    prompts: Sequence[Sequence[int]], length: int = 0
) -> tuple[Int[np.ndarray, 'b t'], Int[np.ndarray, 'b t']]:
    """Aligns prompts at their ends, in rows of at least ``length``.

    Returns:
      The tokens and their positions, which are negative where padding is.
    """
    length = max(length, *map(len, prompts))
    starts = np.array([length - len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        tokens[row, start:] = prompt
    positions = np.arange(length, dtype=np.int32) - starts[:, None]
    return tokens, positions


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _first_state(graphdef: nnx.GraphDef, variables: Any, rows: int, length: int, place: Place | None) -> State:
    """The state before the first token, on a mesh made where it is to lie."""
    state = nnx.merge(graphdef, variables).init_state(rows, length)
    if place is None:
        return state
    return jax.lax.with_sharding_constraint(state, state_shardings(graphdef, variables, rows, length, place.mesh))


def state_shardings(graphdef: nnx.GraphDef, variables: Any, rows: int, max_len: int, mesh: Mesh) -> State:
    """Where a decode state lies on a mesh: what has rows is shared out if they can be, the rest is whole everywhere.

    An array has rows, in its first dimension, if its shape changes with their number; what is computed of weights alone
    does not, such as Hyena's filters.

    Args:
      graphdef, variables: of the model, as ``nnx.split`` gives them; the arrays may be shapes and types alone.
      rows: of the state.
      max_len: of the state.
      mesh: to lie on.
    """
    by_row, whole = layout.batch_sharding(mesh), layout.replicated(mesh)
    splits = rows % axes.rows(mesh.shape) == 0
    make = lambda variables, rows: nnx.merge(graphdef, variables).init_state(rows, max_len)
    one, two = (jax.eval_shape(functools.partial(make, rows=n), variables) for n in (1, 2))
    return jax.tree.map(lambda a, b: by_row if splits and a.shape != b.shape else whole, one, two)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames='place', donate_argnames='state')
def _step(graphdef, sampling, vocab_size, variables, seeds, tokens, positions, state, index, place=None):
    """Runs the model on new tokens and draws the next one of each row; the old state's buffers are reused."""
    model = nnx.merge(graphdef, variables)
    context = Context((positions >= 0).astype(jnp.int32), positions)
    with place.entered() if place else contextlib.nullcontext():
        hidden, state, _ = model(tokens, context, state)
        logits = model.logits(hidden[:, -1])[:, :vocab_size]
    draws = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), index))(seeds)
    chosen = jnp.where(jnp.isfinite(logits).all(-1), sample(logits, draws, sampling), -1)
    if place:  # every process reads all rows' tokens
        chosen = jax.lax.with_sharding_constraint(chosen, layout.replicated(place.mesh))
    return chosen, state


def sample(logits: Float[Array, 'b v'], keys: Array, sampling: Sampling) -> Int[Array, 'b']:
    """Draws one token a row, each with its own key."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    ranked = jnp.sort(logits, axis=-1, descending=True)
    # The lowest logit that stays: a token goes when those above it already reach k tokens or probability p.
    floor = jnp.full(logits.shape[:1], -jnp.inf, logits.dtype)
    if 0 < sampling.top_k < logits.shape[-1]:
        floor = ranked[:, sampling.top_k - 1]
        ranked = jnp.where(ranked >= floor[:, None], ranked, -jnp.inf)
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        above = jnp.cumsum(probabilities, axis=-1) - probabilities
        last = jnp.sum(above < sampling.top_p, axis=-1) - 1
        floor = jnp.maximum(floor, jnp.take_along_axis(ranked, last[:, None], axis=-1)[:, 0])
    logits = jnp.where(logits >= floor[:, None], logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
