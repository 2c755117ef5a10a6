"""Sizes of a model by counting, without allocating it: parameters, operations per token, bytes of decode state."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
from flax import nnx

from mixcon_jax.models.block import parse_layer
from mixcon_jax.models.decoder import Decoder, create
from mixcon_jax.models.presets import CONBA_OFF

SCAN_OPS_PER_STATE = 7  # decay's exponent and exp, decay times state, input times B, their sum, and C's multiply-add


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
      total: all of them.
      active: those that one token uses: of E experts, top_k.
      embedding: the embedding's and the output head's share of the total.
      conba: what Conba adds to the Mamba mixer with norms, contained in total and active.
    """

    total: int
    active: int
    embedding: int
    conba: int


def parameter_count(model) -> Counts:
    """Counts the parameters of ``config.model``."""
    total = active = embedding = 0
    for path, shape, _ in parameters(model):
        size = math.prod(shape)
        total += size
        active += round(size * _used_share(model, path))
        embedding += size if path in ('embedding', 'output') else 0
    conba = 0
    if any(parse_layer(spec).mixer == 'conba' for spec in model.pattern):
        plain = model.copy_and_resolve_references()
        plain.conba.update(CONBA_OFF | {'observation_noise': 0.0})
        conba = total - sum(math.prod(shape) for _, shape, _ in parameters(plain))
    return Counts(total, active, embedding, conba)


def width_for(model, total: int, key: str = 'mlp.hidden_dim') -> int:
    """The width at which ``config.model`` comes nearest to ``total`` parameters: arms of an ablation made equal.

    Args:
      model: ``config.model``; it is not changed.
      total: parameters to have.
      key: the option to choose: a width of the FFNs, in which the number of parameters is affine, up to the rounding of
        an expert's width that is derived from it.

    Raises:
      ValueError: without any of that width there are too many already, or none of the parameters depend on it.
    """
    trial = model.copy_and_resolve_references()
    *groups, name = key.split('.')
    options = functools.reduce(lambda group, part: group[part], groups, trial)

    def counted(width: int) -> int:
        options[name] = width
        return sum(math.prod(shape) for _, shape, _ in parameters(trial))

    # Of an MLP's width w and of an expert's, which is w // top_k where moe.hidden_dim is 0.
    unit = model.moe.top_k
    first = counted(unit)
    each = counted(unit + 1) - first
    each_expert = counted(2 * unit) - first - unit * each if unit > 1 else 0
    slope = each + each_expert / unit
    if slope <= 0:
        raise ValueError(f'model.{key} changes no number of parameters; choose a width that the pattern uses')

    def computed(width: int) -> int:
        return first + each * (width - unit) + each_expert * (max(1, width // unit) - 1)

    if total < computed(1) - slope / 2:
        raise ValueError(f'the model has {computed(1):,} parameters at model.{key}=1, more than the {total:,} wanted')
    near = max(1, round((total - first) / slope) + unit)
    return min(range(max(1, near - unit), near + unit + 1), key=lambda width: abs(computed(width) - total))


def parameters(model) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Yields ``(path, shape, logical axes)`` of every parameter of ``config.model``, stacked blocks as one."""
    for path, variable in nnx.to_flat_state(nnx.state(_abstract(model), nnx.Param)):
        yield '/'.join(map(str, path)), variable.shape, variable.get_metadata()['logical_axes']


def flops_per_token(model, seq_len: int) -> float:
    """Operations of one training token, forward and backward (three times the forward's).

    Counts two per multiply-add of every matrix that the token meets (top_k experts, the head, not the embedding's
    look-up), causal attention over ``seq_len / 2`` keys, the scan's state updates and the matrix gain's products.
    Elementwise work (gates, taps, norms, a diagonal gain) is left out.
    Recomputation (``remat``) is not counted, as usual for MFU.
    """
    forward = 0.0
    for path, shape, axes in parameters(model):
        if path == 'embedding' and not model.tie_embeddings:
            continue
        if len(axes) - ('layers' in axes) >= 2 and not {'conv', 'state'} & set(axes):
            forward += 2 * math.prod(shape) * _used_share(model, path)
    for spec in model.pattern:
        forward += model.num_blocks * _mixer_flops(model, parse_layer(spec).mixer, seq_len)
    return 3 * forward


def _mixer_flops(model, mixer: str, seq_len: int) -> float:
    """Forward operations of a mixer beside its projections."""
    inner = model.ssm.expand * model.dim
    if mixer == 'attention':
        head_dim = model.attention.head_dim or model.dim // model.attention.num_heads
        return 2 * model.attention.num_heads * head_dim * seq_len
    if mixer not in ('mamba', 'conba'):
        return 0.0
    scan = SCAN_OPS_PER_STATE * inner * model.ssm.d_state
    if mixer == 'mamba':
        return scan
    conba, gain = model.conba, 0.0
    if conba.control == 'matrix':
        gain = inner * (4 * conba.head_dim + 4 * conba.gain_chunk)
    elif conba.control == 'slow':
        gain = 2 * inner * conba.head_dim
    # delay='state' is folded into C, once a token.
    readout = 2 * model.ssm.d_state**2 * (inner * (conba.state_scaling == 'readout') + (conba.delay == 'state'))
    return scan * (1 + conba.feedback_iters) + gain * max(1, conba.feedback_iters) + readout


def state_bytes(model, max_len: int) -> int:
    """Bytes of decode state of one sequence whose attention caches hold ``max_len`` tokens."""
    state = nnx.eval_shape(lambda: create(model).init_state(1, max_len))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _abstract(model) -> Decoder:
    return nnx.eval_shape(lambda: create(model))


def _used_share(model, path: str) -> float:
    expert = path.rsplit('/', 1)[-1] in ('w_gate', 'w_up', 'w_down') and _is_moe(model, path)
    return model.moe.top_k / model.moe.num_experts if expert else 1.0


def _is_moe(model, path: str) -> bool:
    layer = path.split('/')[2]
    return parse_layer(model.pattern[int(layer)]).ffn == 'moe'
