"""Attention over a sequence that a mesh axis shares out, and how a mesh may split the call."""

from collections.abc import Mapping
from typing import Any

import jax
from jax import lax

from kernels_pallas import exchange
from kernels_pallas.attention import api
from kernels_pallas.call import Call, bind


def attention(*args, axis_name: str = exchange.AXIS, **kwargs) -> jax.Array:
    """`kernels_pallas.attention` for the queries of this shard, which gathers the keys and values of all.

    Attention reads every earlier token, so that communication grows with the sequence: 2 T K d values a shard. With few
    key heads (grouped queries) that is little beside the products.

    Args:
      args, kwargs: those of `attention`; q, k, v and segment_ids are this shard's tokens, and there is no cache.
      axis_name: the mesh axis that shares out the sequence.
    """
    call = bind(api.attention, *args, **kwargs)
    segment_ids = call['segment_ids']
    call['k'], call['v'] = (exchange.gather_tokens(call[name], axis_name) for name in ('k', 'v'))
    if segment_ids is not None:
        call['kv_segment_ids'] = lax.all_gather(segment_ids, axis_name, axis=1, tiled=True)
    call['q_offset'] = lax.axis_index(axis_name) * call['q'].shape[1]
    return api.attention(**call)


def _whole(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Nothing of a call that reads a cache is split: it is read up to where it is filled."""
    offset = arguments['q_offset']
    cached = arguments['kv_segment_ids'] is not None or not isinstance(offset, int) or offset != 0
    return tuple(AXES) if cached else ()


AXES = {'b': 'batch', 't': 'sequence', 's': 'sequence', 'h': 'heads', 'k': 'kv_heads'}
CALL = Call(api.attention, lambda _: 'b t h d', AXES, attention, _whole)
