"""What the parity tests share: fixtures, our layers and models at the fixtures' sizes, and how the two are compared."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixcon_jax import config as configs
from mixcon_jax.interop import huggingface
from mixcon_jax.models import decoder, kinds, pattern
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Parameters

# `make parity` runs the tests on newly computed fixtures.
FIXTURES = pathlib.Path(os.environ.get('MIXCON_PARITY_FIXTURES', pathlib.Path(__file__).parent / 'fixtures'))
TOLERANCE = 1e-5


def fixture(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / f'{name}.npz') as arrays:
        return dict(arrays)


def architecture(name: str) -> str:
    """The published architecture that a fixture is of, as ``Layer.PUBLISHED`` calls it."""
    return next(each for each in huggingface.ARCHITECTURES if name.startswith(f'{each}_'))


def below(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The entries `prefix/NAME`, by NAME."""
    return {name.removeprefix(f'{prefix}/'): value for name, value in arrays.items() if name.startswith(f'{prefix}/')}


def model_config(options: dict | None = None, **sizes):
    """`config.model` of the sizes in make_fixtures.py, with dotted options."""
    config = configs.default()
    model = config.model
    model.update(dim=32, vocab_size=61, num_blocks=1, tie_embeddings=False, norm_eps=1e-6)
    model.attention.update(num_heads=4, num_kv_heads=2, block_size=8)
    model.ssm.update(d_state=8, dt_rank=4)
    model.mlp.hidden_dim = 48
    model.moe.update(num_experts=4, top_k=2, hidden_dim=48)
    model.conba.update(head_dim=16, gain_chunk=8)
    model.update(sizes)
    for key, value in (options or {}).items():
        configs.put(config, f'model.{key}', value)
    return pattern.resolve(model)


def layer(kind: str, config) -> nnx.Module:
    return kinds.load(kind)(config, Parameters(jax.random.key(0)), 4)


def model(config) -> nnx.Module:
    return decoder.create(config, 0)


def load(module: nnx.Module, weights: dict[str, np.ndarray]) -> set[str]:
    """Puts weights in by name; returns the names of the parameters that keep their initial values."""
    state = nnx.state(module, nnx.Param)
    flat = {'/'.join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    missing = weights.keys() - flat.keys()
    assert not missing, f'the module has no parameters {sorted(missing)}, only {sorted(flat)}'
    for name, value in weights.items():
        assert flat[name].shape == value.shape, f'{name}: {flat[name].shape} here, {value.shape} there'
        flat[name].set_value(jnp.asarray(value))
    nnx.update(module, state)
    return flat.keys() - weights.keys()


def by_name(state) -> dict[str, np.ndarray]:
    return {'/'.join(map(str, path)): np.asarray(variable[...]) for path, variable in nnx.to_flat_state(state)}


def run_layer(module: nnx.Module, x: np.ndarray, dy: np.ndarray):
    """Output, gradient of the input, and gradients by name, of <y, dy>."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    context = Context.whole(*x.shape[:2])

    @jax.jit
    def run(params, x):
        def apply(params, x):
            return nnx.merge(graphdef, params, rest)(x, context, None)[0]

        y, pullback = jax.vjp(apply, params, x)
        return y, *pullback(jnp.asarray(dy, y.dtype))

    y, dw, dx = run(params, jnp.asarray(x))
    return np.asarray(y), np.asarray(dx), by_name(dw)


def run_model(module: nnx.Module, tokens: np.ndarray, dy: np.ndarray):
    """Logits, and gradients by name, of <logits, dy>."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    context = Context.whole(*tokens.shape)

    @jax.jit
    def run(params):
        def apply(params):
            model = nnx.merge(graphdef, params, rest)
            return model.logits(model(jnp.asarray(tokens), context)[0])

        y, pullback = jax.vjp(apply, params)
        return y, *pullback(jnp.asarray(dy, y.dtype))

    y, dw = run(params)
    return np.asarray(y), by_name(dw)


def assert_same(ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
    """Largest difference at most 1e-5 of the largest value."""
    assert ours.shape == theirs.shape, f'{what}: shape {ours.shape} here, {theirs.shape} there'
    difference = np.abs(ours.astype(np.float64) - theirs).max() / np.abs(theirs).max()
    assert difference <= TOLERANCE, f'{what} differs by {difference:.1e} of its largest value'
