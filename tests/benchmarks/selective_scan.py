"""Selective scan against a whole-sequence associative scan, and against its own forward pass.

`python -m tests.benchmarks.selective_scan` prints time, temporaries and compile time of forward + backward (a gradient
step) and of the forward pass alone, against the textbook form in the same run: at one shape, there also of the other
implementations and of Conba's options, and at a short length.
"""

import argparse
import operator
import sys
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.selective_scan import selective_scan
from tests.benchmarks.timing import Timing, compare, table

BASELINE, CHUNKED = 'associative_scan', 'chunked'
BASELINE_FORWARD, CHUNKED_FORWARD = f'{BASELINE}, forward only', f'{CHUNKED}, forward only'
SHORT = 128  # tokens of the short sequence

SPEED, SHARE, RATIO = 'speed against associative_scan', 'share of its temporaries', 'forward + backward by forward'
TARGETS = {SPEED: ('>=', 5), SHARE: ('<=', 1 / 20), RATIO: ('<=', 4.5)}
SHORT_TARGETS = {SPEED: ('>=', 1)}
HOLDS = {'>=': operator.ge, '<=': operator.le}

Cases = dict[str, tuple[Callable, Sequence[jax.Array]]]


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


def plain_cases(args: Sequence[jax.Array]) -> Cases:
    """The plain scan and the textbook form, with gradient and without."""
    return {
        BASELINE: (value_and_gradient(textbook), args),
        CHUNKED: (value_and_gradient(), args),
        BASELINE_FORWARD: (textbook, args),
        CHUNKED_FORWARD: (selective_scan, args),
    }


def variants(args: Sequence[jax.Array]) -> Cases:
    """Other implementations and Conba's options, with gradient."""
    (batch, length, channels), states = args[0].shape, args[2].shape[1]
    reset = jax.random.bernoulli(jax.random.key(1), 0.01, (batch, length))
    readout = (0.1 * jnp.eye(states), jnp.full(states, 1.2784645), jnp.zeros((states, states)))
    functions = {
        "implementation='associative'": value_and_gradient(implementation='associative'),
        'chunked, associative within': value_and_gradient(implementation='chunked_associative'),
        'chunked + reset': value_and_gradient(reset=reset),
        'chunked + prior': value_and_gradient(prior=True),
        'chunked + readout': value_and_gradient(readout=readout),
        'chunked + delay': value_and_gradient(delay=jnp.full(channels, 0.1)),
    }
    return {name: (function, args) for name, function in functions.items()}


def figures(timings: Mapping[str, Timing]) -> dict[str, float]:
    """What has targets: the chunked scan against the textbook form and against its own forward pass."""
    chunked, baseline = timings[CHUNKED], timings[BASELINE]
    return {
        SPEED: baseline.best / chunked.best,
        SHARE: chunked.temporary_bytes / baseline.temporary_bytes,
        RATIO: chunked.best / timings[CHUNKED_FORWARD].best,
    }


def judge(found: Mapping[str, float], targets: Mapping[str, tuple[str, float]]) -> list[str]:
    """Prints every figure, with its target where it has one; returns those that miss it."""
    missed = []
    for name, figure in found.items():
        relation, target = targets.get(name, ('', 0))
        line = f'{name}: {figure:.3g}' + (f' (target {relation} {target:.3g})' if relation else '')
        print(f'  {line}')
        if relation and not HOLDS[relation](figure, target):
            missed.append(line)
    return missed


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (('batch', 2), ('length', 2048), ('channels', 512), ('states', 16), ('repeats', 5)):
        parser.add_argument(f'--{name}', type=int, default=value)
    options = parser.parse_args(arguments)
    missed = []
    for length, targets in ((options.length, TARGETS), (SHORT, SHORT_TARGETS)):
        args = inputs(options.batch, length, options.channels, options.states)
        if length == options.length:
            timings = compare(plain_cases(args) | variants(args), options.repeats)
        else:
            timings = compare(plain_cases(args), 4 * options.repeats)
        shape = f'B{options.batch} T{length} D{options.channels} N{options.states}'
        print(f'selective scan, forward + backward unless it is said, {shape}')
        print(table(timings, BASELINE))
        print(f'  compile time of a gradient step: {timings[CHUNKED].compile_seconds:.1f} s', end='')
        print(f', {BASELINE} {timings[BASELINE].compile_seconds:.1f} s')
        missed += [f'T{length}, {line}' for line in judge(figures(timings), targets)]
    assert not missed, '; '.join(missed)


if __name__ == '__main__':
    main(sys.argv[1:])
