"""Retention, gated linear attention, RWKV-6 and 7 are the loops that their papers write, a token and head at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax.models.context import Context
from tests.models.cases import DIM, layer

LENGTHS, HEADS = (1, 3, 17, 64, 129), 4
T = max(LENGTHS)


def weights(name):
    """A layer's parameters and a sequence, in float64."""
    module = layer(name)
    x = jax.random.normal(jax.random.key(11), (1, T, DIM))
    names = [key for key, value in vars(module).items() if hasattr(value, 'get_metadata')]
    return module, x, {key: np.asarray(getattr(module, key)[...], np.float64) for key in names}


def heads(x):
    return x.reshape(len(x), HEADS, -1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rotated(x):
    """Complex numbers of the two halves of a head, turned by position times frequency."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


def retnet(x, w):
    q, k, v, g = (heads(x @ w[f'{name}_proj']) for name in 'qkvg')
    q, k = rotated(q), rotated(k) / np.sqrt(k.shape[-1])
    out = np.zeros_like(v)
    for h in range(HEADS):
        gamma, state = 1 - 2.0 ** (-5 - h), np.zeros((k.shape[-1], v.shape[-1]))
        for t in range(len(x)):
            state = gamma * state + np.outer(k[t, h], v[t, h])
            o = q[t, h] @ state
            out[t, h] = (o - o.mean()) / np.sqrt(o.var() + 1e-6) * g[t, h] * sigmoid(g[t, h])
    return out.reshape(len(x), -1) @ w['o_proj']


def gla(x, w):
    q, k, v = (heads(x @ w[f'{name}_proj']) for name in 'qkv')
    alpha = heads(sigmoid(x @ w['gate_down'] @ w['gate_up'] + w['gate_bias']) ** (1 / 16))
    r = heads(x @ w['r_proj'] + w['r_bias'])
    out = np.zeros_like(v)
    for h in range(HEADS):
        state = np.zeros((k.shape[-1], v.shape[-1]))
        for t in range(len(x)):
            state = alpha[t, h][:, None] * state + np.outer(k[t, h], v[t, h])
            o = q[t, h] @ state / np.sqrt(k.shape[-1])
            out[t, h] = o / np.sqrt(np.mean(o**2) + 1e-6) * w['norm'] * r[t, h] * sigmoid(r[t, h])
    return out.reshape(len(x), -1) @ w['o_proj']


def rwkv6(x, w):
    before = np.concatenate([np.zeros((1, DIM)), x[:-1]])
    low = np.tanh((x + (before - x) * w['mix_x']) @ w['mix_down']).reshape(len(x), 5, -1)
    streams = [x + (before - x) * (w['mix'][i] + low[:, i] @ w['mix_up'][i]) for i in range(5)]
    k, v, r = (heads(streams[i] @ w[f'{name}_proj']) for i, name in ((1, 'k'), (2, 'v'), (3, 'r')))
    decay = heads(np.exp(-np.exp(w['decay'] + np.tanh(streams[0] @ w['decay_down']) @ w['decay_up'])))
    gate, u = streams[4] @ w['g_proj'], w['bonus'].reshape(HEADS, -1)
    out = np.zeros_like(v)
    for h in range(HEADS):
        state = np.zeros((k.shape[-1], v.shape[-1]))
        for t in range(len(x)):
            own = np.outer(k[t, h], v[t, h])
            o = r[t, h] @ (state + u[h][:, None] * own)
            state = decay[t, h][:, None] * state + own
            out[t, h] = (o - o.mean()) / np.sqrt(o.var() + 64e-5)
    out = out.reshape(len(x), -1) * w['norm'] + w['norm_bias']
    return (gate * sigmoid(gate) * out) @ w['o_proj']


def rwkv7(x, w):
    before = np.concatenate([np.zeros((1, DIM)), x[:-1]])
    for_r, for_w, for_k, for_v, for_a, for_g = (x + (before - x) * w['mix'][i] for i in range(6))
    r, k, v = heads(for_r @ w['r_proj']), for_k @ w['k_proj'], heads(for_v @ w['v_proj'])
    d = w['decay'] + np.tanh(for_w @ w['decay_down']) @ w['decay_up']
    decay = heads(np.exp(-np.exp(-0.5) * sigmoid(d)))
    rate = sigmoid(w['rate'] + for_a @ w['rate_down'] @ w['rate_up'])
    gate = sigmoid(for_g @ w['gate_down']) @ w['gate_up']
    kappa, key = heads(k * w['removal']), heads(k * (1 - w['replacement'] + w['replacement'] * rate))
    rate, bonus = heads(rate), w['bonus'].reshape(HEADS, -1)
    out, scale, bias = np.zeros_like(v), w['norm'].reshape(HEADS, -1), w['norm_bias'].reshape(HEADS, -1)
    for h in range(HEADS):
        state = np.zeros((v.shape[-1], k.shape[-1] // HEADS))
        for t in range(len(x)):
            hat = kappa[t, h] / np.linalg.norm(kappa[t, h])
            transition = np.diag(decay[t, h]) - np.outer(hat, rate[t, h] * hat)
            state = state @ transition + np.outer(v[t, h], key[t, h])
            o = r[t, h] @ state.T
            normed = (o - o.mean()) / np.sqrt(o.var() + 64e-5) * scale[h] + bias[h]
            out[t, h] = normed + r[t, h] @ (bonus[h] * key[t, h]) * v[t, h]
    return (gate * out.reshape(len(x), -1)) @ w['o_proj']


LOOPS = [('retnet', retnet), ('gla', gla), ('rwkv6', rwkv6), ('rwkv7', rwkv7)]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize('name, loop', LOOPS)
@pytest.mark.parametrize('lengths', [(T,), slow((1, 3, 17, 64))])
def test_a_layer_is_the_papers_loop(name, loop, lengths):
    module, x, w = weights(name)
    want = loop(np.asarray(x[0], np.float64), w)
    run = jax.jit(lambda x: module(x, Context.whole(*x.shape[:2]), None)[0])
    for length in lengths:
        y = run(x[:, :length])
        np.testing.assert_allclose(y[0], want[:length], rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize('name, loop', [*(slow(*case) for case in LOOPS[:3]), LOOPS[3]])
def test_a_layers_gradients_are_the_loops(name, loop):
    """Each parameter's, and the tokens', along itself and along a random direction: by differences of the loop."""
    module, x, w = weights(name)
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    x, dy = x[:, :17], np.random.default_rng(5).normal(size=(17, DIM))

    def ours(params, x):
        return jnp.sum(nnx.merge(graphdef, params, rest)(x, Context.whole(*x.shape[:2]), None)[0][0] * dy)

    by_param, dx = jax.jit(jax.grad(ours, (0, 1)))(params, x)
    gradients = {key: by_param[key][...] for key in w} | {'x': dx[0]}
    values = w | {'x': np.asarray(x[0], np.float64)}
    for key, gradient in gradients.items():
        gradient = np.asarray(gradient, np.float64)
        length = np.linalg.norm(gradient)
        assert length > 0, key
        random = np.random.default_rng(len(key)).normal(size=gradient.shape)
        for direction in (gradient / length, random / np.linalg.norm(random)):
            slope = (
                loss(loop, dy, values | {key: values[key] + 1e-5 * direction})
                - loss(loop, dy, values | {key: values[key] - 1e-5 * direction})
            ) / 2e-5
            np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=0, atol=1e-5 * length, err_msg=key)


def loss(loop, dy, values):
    return np.sum(loop(values['x'], values) * dy)
