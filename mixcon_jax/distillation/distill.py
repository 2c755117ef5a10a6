"""``mixcon distill-filters``: a run whose Hyena layers have become modal, and how far its predictions moved."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mixcon_jax import derived
from mixcon_jax.data import files
from mixcon_jax.distillation.filters import Fit, distilled, hyena_layers
from mixcon_jax.distillation.modes import most_waves
from mixcon_jax.evaluate import rows_to_score
from mixcon_jax.host.paths import expand_folder
from mixcon_jax.inference.load import load_model
from mixcon_jax.models import accounting, decoder
from mixcon_jax.models.context import Context
from mixcon_jax.runs import saved
from mixcon_jax.runs.checkpoints import Meta
from mixcon_jax.runs.mark import path_of
from mixcon_jax.runs.run import CHECKPOINTS
from mixcon_jax.step import BATCH_KEYS


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Two models on the same tokens: the mean of KL(before || after) and both mean losses, in nats a token."""

    kl: float
    before: float
    after: float
    tokens: int


def distill(
    workdir: str | Path,
    out: str | Path,
    *,
    step: int | str | None = None,
    order: int = 0,
    tolerance: float = 1e-2,
    paths: Sequence[str] = (),
    rows: int = 64,
    say: Callable[[str], None] = print,
) -> tuple[list[Fit], Divergence]:
    """Writes a run whose Hyena layers are modal: it decodes with a constant state, and its optimizer is new.

    Args:
      workdir: a run directory.
      out: the new run's; nothing may be there.
      step: a checkpoint's step, ``'best'`` or None for the newest intact one.
      order: modes a channel at most; 0 takes as many as ``tolerance`` asks for, everywhere as the worst channel needs.
      tolerance: as of ``modes.fit``.
      paths: text files to compare the two on; none means held-out text.
      rows: to compare on, about.
      say: takes a line about each filter, and about the models.

    Raises:
      UserError: no such checkpoint, no Hyena in it, its data has become another, or something is at ``out``.
    """
    paths, target = files.given(paths), derived.new_folder(out)
    trained = load_model(workdir, step)
    config = trained.config
    length = max(part.model.hyena.max_len for part in hyena_layers(config.model).values())
    if order > (most := most_waves(length)):
        say(f'--order {order} is more than filters of {length} tokens have: {most} at most')
    batches = rows_to_score(trained, config, workdir, paths, min(rows, config.eval.batch_size))
    modal, trees, fits = distilled(trained.model, config, order, tolerance)
    for fit in fits:
        say(
            f'layer {fit.layer}, filter {fit.index + 1}: {fit.states} modes a channel, relative error {fit.error:.2e},'
            f' {fit.worst:.2e} of the worst channel'
        )
    if not order and (far := sum(fit.error > tolerance for fit in fits)):
        say(
            f'{far} of {len(fits)} filters are more than {tolerance:g} of their norm off; a smaller --tolerance takes'
            f' more modes, of filters of {length} tokens {most} at most'
        )
    modal_net, few = derived.built(modal.model, trees), itertools.islice(batches, -(-rows // batches.batch_size))
    found = compare(trained.model, modal_net, few)
    say(
        f'KL {found.kl:.2e} nats a token over {found.tokens:,} tokens; loss {found.before:.4f} before,'
        f' {found.after:.4f} after'
    )
    tokens_seen = saved.contents(expand_folder(path_of(workdir)) / CHECKPOINTS, trained.step)['tokens_seen']
    meta = Meta(trained.step, modal.to_dict(), trained.tokenizer.to_json(), trained.data, tokens_seen)
    derived.write(target, modal, trees, meta, workdir)
    before, after = (accounting.state_bytes(each.model, config.data.seq_len) for each in (config, modal))
    say(f'{target}: {after:,} bytes of state at {config.data.seq_len} tokens, where there were {before:,}')
    return fits, found


def compare(before: decoder.Decoder, after: decoder.Decoder, batches: Iterable[Mapping[str, np.ndarray]]) -> Divergence:
    """Reads the batches by both models; only the scored tokens count."""
    split = [nnx.split(model) for model in (before, after)]
    graphs = [graphdef for graphdef, _ in split]

    @jax.jit
    def sums(variables: Sequence[nnx.State], batch: Mapping[str, Array]) -> Float[Array, 'four']:
        models = [nnx.merge(*each) for each in zip(graphs, variables, strict=True)]
        context = Context(batch['segment_ids'], batch['positions'])
        hidden = [model(batch['tokens'], context)[0] for model in models]

        def row(one: tuple) -> Float[Array, 'four']:  # logits of one row at a time
            first, second, targets, mask = one
            scores = [jax.nn.log_softmax(model.logits(x)) for model, x in zip(models, (first, second), strict=True)]
            kl = jnp.sum(jnp.exp(scores[0]) * (scores[0] - scores[1]), -1)
            losses = [-jnp.take_along_axis(score, targets[:, None], 1)[:, 0] for score in scores]
            return jnp.stack([jnp.sum(jnp.where(mask, x, 0)) for x in (kl, *losses, jnp.ones_like(kl))])

        return jnp.sum(jax.lax.map(row, (*hidden, batch['targets'], batch['loss_mask'])), 0)

    total = np.zeros(4)
    for batch in batches:
        total += np.asarray(sums([each for _, each in split], {name: jnp.asarray(batch[name]) for name in BATCH_KEYS}))
    kl, first, second, tokens = total
    count = max(int(tokens), 1)
    kl = np.maximum(kl, 0)  # of two models that are alike rounding may leave less; NaN stays
    return Divergence(float(kl) / count, float(first) / count, float(second) / count, int(tokens))
