"""No index of attention overflows, however many numbers its arrays hold: bounds of all integers in its program.

Nothing of that size runs. From the bounds of what comes in follow, operation by operation, those of every integer that
the traced program computes, and each must fit its type.
"""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal

from kernels_pallas import platform
from kernels_pallas.attention import attention

Bounds = tuple[int, int] | None  # the least and the greatest; None of what is no integer
LENGTH = 8192
SHAPES = {  # q and k
    'rows': ((2048, LENGTH, 32, 128), (2048, LENGTH, 8, 128)),
    'one row': ((1, LENGTH, 4096, 128), (1, LENGTH, 4096, 128)),
    'cache': ((16, 1000, 2048, 128), (16, LENGTH, 256, 128)),
}
SAME = {
    'convert_element_type', 'broadcast_in_dim', 'reshape', 'squeeze', 'transpose', 'slice', 'dynamic_slice',
    'reduce_max', 'reduce_min',
}  # fmt: skip


def union(*bounds: Bounds) -> Bounds:
    lows, highs = zip(*(found for found in bounds if found is not None))
    return min(lows), max(highs)


def result(operation, given: list[Bounds]) -> Bounds:
    """The bounds of an operation's one integer result."""
    name, aval = operation.primitive.name, operation.outvars[0].aval
    if aval.dtype == bool:
        return 0, 1
    if name in SAME:
        return given[0]
    if name in ('concatenate', 'pad'):
        return union(*given)
    if name == 'select_n':
        return union(*given[1:])
    if name == 'iota':
        return 0, aval.shape[operation.params['dimension']] - 1
    if name == 'reduce_sum':
        count, (low, high) = operation.invars[0].aval.size // max(aval.size, 1), given[0]
        return min(0, low * count), max(0, high * count)
    (a, b), (c, d) = given
    if name == 'add':
        return a + c, b + d
    if name == 'sub':
        return a - d, b - c
    if name == 'mul':
        ends = a * c, a * d, b * c, b * d
        return min(ends), max(ends)
    raise NotImplementedError(f'the bounds of {operation}')


def follow(jaxpr, consts, given: list[Bounds]) -> list[Bounds]:
    """The bounds of a program's results; that an integer in it may not fit its type is an OverflowError."""
    known: dict = dict(zip(jaxpr.invars, given, strict=True))
    known |= {variable: of_value(value) for variable, value in zip(jaxpr.constvars, consts, strict=True)}
    read = lambda atom: of_value(atom.val) if isinstance(atom, Literal) else known[atom]
    for operation in jaxpr.eqns:
        found = [read(atom) for atom in operation.invars]
        if operation.primitive.name in ('scan', 'while'):
            results = loop(operation, found)
        elif inner := operation.params.get('jaxpr') or operation.params.get('call_jaxpr'):
            results = follow(getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ()), found)
        elif type(operation.params.get('_prim')).__name__ == 'Nonzero':
            results = [(0, size - 1) for size in operation.invars[0].aval.shape]
        elif counted(operation.outvars[0].aval):
            results = [result(operation, found)]
        else:
            results = [None] * len(operation.outvars)
        for variable, bounds in zip(operation.outvars, results, strict=True):
            if bounds is not None and variable.aval.dtype != bool:
                limits = jnp.iinfo(variable.aval.dtype)
                if bounds[0] < limits.min or bounds[1] > limits.max:
                    raise OverflowError(f'{operation} may be {bounds}')
            known[variable] = bounds
    return [read(atom) for atom in jaxpr.outvars]


def loop(operation, given: list[Bounds]) -> list[Bounds]:
    """A loop's carry grows in every round as much as in the first, as a counter does."""
    params = operation.params
    if operation.primitive.name == 'scan':
        kept = len(given) - len(operation.outvars)  # nothing is scanned over, and nothing stacked
        body, consts, carry, rounds = params['jaxpr'], given[:kept], given[kept:], params['length']
    else:
        tests, kept = params['cond_nconsts'], params['cond_nconsts'] + params['body_nconsts']
        body, consts, carry = params['body_jaxpr'], given[tests:kept], given[kept:]
        compared = (atom for test in params['cond_jaxpr'].jaxpr.eqns for atom in test.invars)
        numbers = [of_value(atom.val) for atom in compared if isinstance(atom, Literal)]
        scalars = [found for found in (*given[:tests], *carry, *numbers) if found is not None]
        rounds = max(high for _, high in scalars)  # up to which it may count
    after = follow(body.jaxpr, body.consts, [*consts, *carry])
    grown = [
        x and (x[0] + rounds * min(0, y[0] - x[0]), x[1] + rounds * max(0, y[1] - x[1])) for x, y in zip(carry, after)
    ]
    follow(body.jaxpr, body.consts, [*consts, *grown])
    return grown


def counted(aval) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.integer) or aval.dtype == bool


def of_value(value) -> Bounds:
    value = np.asarray(value)
    return (int(value.min()), int(value.max())) if counted(value) and value.size else None


def followed(function, *arguments: jax.ShapeDtypeStruct, **bounds: tuple[int, int]) -> None:
    """Follows a function of arrays; those of integers, the last, have these bounds."""
    program = jax.make_jaxpr(function)(*arguments)
    follow(program.jaxpr, program.consts, [None] * (len(arguments) - len(bounds)) + list(bounds.values()))


@pytest.mark.parametrize('on', ['cpu', 'gpu'])
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('name', SHAPES)
def test_no_integer_overflows_however_many_queries_there_are(name, packed, on, monkeypatch):
    """Forward and backward; a cache at a traced offset."""
    monkeypatch.setattr(platform, 'platform', lambda: on)
    of_q, of_k = SHAPES[name]
    assert math.prod(of_q) > 2**31
    shape = lambda sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)

    def gradients(q, k, v, ids, kv_ids, q_offset):
        options = {'segment_ids': ids, 'kv_segment_ids': kv_ids} if packed else {}
        options['q_offset'] = q_offset if name == 'cache' else 0
        loss = lambda *qkv: jnp.sum(attention(*qkv, implementation='blockwise', **options).astype(jnp.float32))
        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    arguments = shape(of_q), shape(of_k), shape(of_k), shape(of_q[:2], jnp.int32), shape(of_k[:2], jnp.int32)
    found = jax.eval_shape(gradients, *arguments, shape((), jnp.int32))
    assert [x.shape for x in found] == [of_q, of_k, of_k]
    documents, offset = (0, 2**31 - 1), (0, LENGTH - of_q[1])
    followed(gradients, *arguments, shape((), jnp.int32), ids=documents, kv_ids=documents, q_offset=offset)


def flat(q, row):
    return row * (8192 * 32 * 128) + jnp.arange(128)


def counted_up(rounds):
    return lambda q, row: jax.lax.fori_loop(0, rounds, lambda i, place: place + 8192 * 32 * 128, row)


@pytest.mark.parametrize(
    'function, row, fits',
    [(flat, 63, True), (flat, 64, False), (counted_up(62), 0, True), (counted_up(64), 0, False)],
)
def test_an_index_through_batch_and_heads_would_be_found(function, row, fits):
    """What the bounds are for: a place in all of q, in 32 bits, also where a loop counts up to it."""
    q, place = jax.ShapeDtypeStruct((64, 8192, 32, 128), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.int32)
    with contextlib.nullcontext() if fits else pytest.raises(OverflowError):
        followed(function, q, place, row=(0, row))
