"""The convolution of many lags against a sum over tokens and lags, in float64, with documents, states and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.causal_conv1d import blocked, causal_conv1d

CASES = [(1, 1, 1, 1), (2, 7, 13, 3), (1, 40, 13, 2), (2, 21, 33, 3), (1, 5, 64, 2)]  # rows, tokens, lags, channels


def draw(rows, tokens, lags, channels, seed=0):
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((rows, tokens, channels)), rng.standard_normal((lags, channels))
    past, dy = rng.standard_normal((rows, lags - 1, channels)), rng.standard_normal((rows, tokens, channels))
    starts = rng.random((rows, tokens)) < 0.15
    positions = np.zeros((rows, tokens), np.int32)
    for b in range(rows):
        place = 5  # the first document began five tokens before this call
        for t in range(tokens):
            positions[b, t] = place = 0 if starts[b, t] else place
            place += 1
    return x, weight, positions, past, dy


def loop(x, weight, positions, past):
    """Every token and lag by itself."""
    values, y = np.concatenate([past, x], 1), np.zeros(x.shape)
    for b, t, lag in np.ndindex(*x.shape[:2], len(weight)):
        if lag <= positions[b, t]:
            y[b, t] += weight[lag] * values[b, t + past.shape[1] - lag]
    return y


@pytest.mark.parametrize('case', CASES, ids=str)
@pytest.mark.parametrize('seed', range(2))
def test_outputs_and_gradients_are_those_of_a_loop_over_lags(case, seed):
    x, weight, positions, past, dy = draw(*case, seed)
    with jax.enable_x64(True):
        run = lambda x, weight, past: blocked.conv(x, weight, jnp.asarray(positions), past)
        y, pull = jax.vjp(run, *map(jnp.asarray, (x, weight, past)))
        np.testing.assert_allclose(y, loop(x, weight, positions, past), rtol=1e-10, atol=1e-10)
        # It is linear in x and past together, and in the weights: the gradient is what a loop makes of unit vectors.
        found = pull(jnp.asarray(dy))
    rng = np.random.default_rng(9)
    for i, value in enumerate((x, weight, past)):
        direction = rng.standard_normal(value.shape)
        changed = [np.zeros_like(x), weight, np.zeros_like(past)]
        changed[i] = direction
        if i == 1:
            changed[0], changed[2] = x, past
        np.testing.assert_allclose(
            np.vdot(found[i], direction),
            np.vdot(loop(changed[0], changed[1], positions, changed[2]), dy),
            rtol=1e-9,
            atol=1e-9,
        )


def test_both_forms_agree_and_many_lags_are_not_written_out():
    x, weight, positions, past, _ = (jnp.asarray(value, jnp.float32) for value in draw(2, 21, 17, 3))
    given = {'lags': range(17), 'positions': positions.astype(jnp.int32), 'initial_state': past}
    (want, state), (got, final) = (
        causal_conv1d(x, weight, **given, implementation=implementation) for implementation in ('xla', 'blocked')
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(final, state)
    program = lambda **options: str(jax.make_jaxpr(lambda x, w: causal_conv1d(x, w, **options)[0])(x, weight))
    assert 'scan' in program(lags=range(17)) and 'scan' not in program()
    for options in ({'activation': 'silu'}, {'residual': True}, {'bias': weight[0]}):
        assert 'scan' not in program(lags=range(17), **options)
    with pytest.raises(ValueError, match='cannot run here: it takes the lags 0, 1'):
        causal_conv1d(x, weight, implementation='blocked')


def test_no_gradient_keeps_an_array_of_xs_size_for_every_lag():
    """Temporaries of the compiled gradient, of 8 and of 64 lags: far less than one x more for each."""
    x, positions = jnp.zeros((1, 2048, 16)), jnp.broadcast_to(jnp.arange(2048), (1, 2048))

    def temporaries(lags):
        loss = lambda x, weight: jnp.sum(jnp.sin(blocked.conv(x, weight, positions, None)))
        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, jnp.zeros((lags, 16))).compile()
        return program.memory_analysis().temp_size_in_bytes / x.nbytes

    assert temporaries(64) < temporaries(8) + 3


def test_bfloat16_is_summed_in_float32():
    x = jnp.concatenate([jnp.full((1, 1, 1), 256.0), jnp.ones((1, 31, 1))], 1).astype(jnp.bfloat16)
    y, _ = causal_conv1d(x, jnp.ones((32, 1)), lags=range(32))
    assert y[0, -1, 0] == 288  # 287, rounded once to bfloat16; summed in bfloat16 it would stay 256
