"""Selective scan, forward and backward, against a whole-sequence associative scan.

`python -m tests.benchmarks.selective_scan` prints time, temporaries and compile time at one shape, of the
implementations and of the options of Conba, against the textbook form in the same run.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.selective_scan import selective_scan
from tests.benchmarks.timing import Timing, compare, table

BASELINE, TARGET_SPEED, TARGET_SHARE = 'associative_scan', 5.0, 1 / 20


def inputs(batch: int, length: int, channels: int, states: int) -> tuple[jax.Array, ...]:
    """u, dt, A, B, C as Mamba's initialisation gives them."""
    keys = jax.random.split(jax.random.key(0), 4)
    u = jax.random.normal(keys[0], (batch, length, channels))
    dt = jax.nn.softplus(jax.random.normal(keys[1], (batch, length, channels)) - 3)
    A = jnp.broadcast_to(-jnp.arange(1.0, states + 1), (channels, states))
    B, C = (jax.random.normal(key, (batch, length, states)) for key in keys[2:])
    return u, dt, A, B, C


def textbook(u: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The plain scan from a zero state as one `associative_scan` over the sequence, with nothing to pay for options."""
    decay = jnp.exp(dt[..., None] * A)
    drive = (dt * u)[..., None] * B[:, :, None, :]
    combine = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])
    _, x = jax.lax.associative_scan(combine, (decay, drive), axis=1)
    return jnp.einsum('btdn,btn->btd', x, C), x[:, -1]


def value_and_gradient(scan: Callable = selective_scan, **options) -> Callable:
    """A function of the five inputs that returns a scalar of the outputs and its gradient for all of them."""

    def loss(*args):
        y, final_state, *prior = scan(*args, **options)
        return sum(jnp.sum(jnp.sin(x)) for x in (y, final_state, *prior))

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))


def run(
    batch: int = 2, length: int = 2048, channels: int = 512, states: int = 16, repeats: int = 5
) -> dict[str, Timing]:
    args = inputs(batch, length, channels, states)
    reset = jax.random.bernoulli(jax.random.key(1), 0.01, (batch, length))
    readout = (0.1 * jnp.eye(states), jnp.full(states, 1.2784645), jnp.zeros((states, states)))
    cases = {
        BASELINE: value_and_gradient(textbook),
        "implementation='associative'": value_and_gradient(implementation='associative'),
        'chunked': value_and_gradient(),
        'chunked, associative within': value_and_gradient(implementation='chunked_associative'),
        'chunked + reset': value_and_gradient(reset=reset),
        'chunked + prior': value_and_gradient(prior=True),
        'chunked + readout': value_and_gradient(readout=readout),
        'chunked + delay': value_and_gradient(delay=jnp.full(channels, 0.1)),
    }
    return compare({name: (function, args) for name, function in cases.items()}, repeats)


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (('batch', 2), ('length', 2048), ('channels', 512), ('states', 16), ('repeats', 5)):
        parser.add_argument(f'--{name}', type=int, default=value)
    args = parser.parse_args(arguments)
    print(f'selective scan, forward + backward, B{args.batch} T{args.length} D{args.channels} N{args.states}')
    timings = run(args.batch, args.length, args.channels, args.states, args.repeats)
    print(table(timings, BASELINE))
    speed = timings[BASELINE].best / timings['chunked'].best
    share = timings['chunked'].temporary_bytes / timings[BASELINE].temporary_bytes
    print(
        f'chunked: {speed:.1f} times as fast (target {TARGET_SPEED:.0f}), 1/{1 / share:.0f} of the temporaries '
        f'(target 1/{1 / TARGET_SHARE:.0f})'
    )
    assert speed >= TARGET_SPEED, f'chunked is only {speed:.1f} times as fast as {BASELINE}'
    assert share <= TARGET_SHARE, f'chunked needs {share:.3f} of the temporaries of {BASELINE}'


if __name__ == '__main__':
    main(sys.argv[1:])
