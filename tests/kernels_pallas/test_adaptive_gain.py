"""Adaptive gains: chunked equals sequential to 1e-12 in float64, documents packed or not."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.adaptive_gain import diagonal_gain, matrix_gain

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

B, H, P = 2, 2, 6
GAINS = {'matrix': matrix_gain, 'diagonal': diagonal_gain}
EXACT = {'rtol': 1e-12, 'atol': 1e-12}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(kind, seed, length):
    rng = np.random.default_rng(seed)
    arrays = {
        'e': jnp.asarray(rng.normal(size=(B, length, H, P))),
        'alpha': jnp.asarray(rng.uniform(size=(B, length, H))),
        'log_decay': -jnp.asarray(rng.exponential(0.1, size=(B, length, H))),
        'initial_gain': jnp.asarray(rng.normal(size=(B, H, P, P) if kind == 'matrix' else (B, H, P))),
    }
    reset = rng.random((B, length)) < 0.05
    reset[0, [t for t in (0, 8, 9, 31, 32, 256) if t < length]] = True  # borders of chunks and of groups, neighbours
    return arrays, jnp.asarray(reset)


def call(kind, arrays, reset=None, **options):
    def run(arrays, reset):
        return GAINS[kind](**arrays, reset=reset, **options)

    return jax.jit(run)(arrays, reset)


def outputs_and_gradients(kind, arrays, **options):
    def loss(arrays):
        outputs = call(kind, arrays, **options)
        weights = [jax.random.normal(jax.random.key(i), y.shape) for i, y in enumerate(outputs)]
        return sum(jnp.vdot(weight, jnp.sin(y)) for weight, y in zip(weights, outputs)), outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)


def assert_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or EXACT)), actual, expected)


@pytest.mark.parametrize('kind', GAINS)
@pytest.mark.parametrize('length', [1, slow(7), slow(64), 129, 300])
def test_chunked_equals_sequential(kind, length):
    """Reads, final gain and the gradient of every array, with documents that start anywhere; 300 is two groups."""
    arrays, reset = draw(kind, length, length)
    expected = outputs_and_gradients(kind, arrays, reset=reset, implementation='reference')
    (_, outputs), gradients = outputs_and_gradients(kind, arrays, reset=reset)
    assert_close(outputs, expected[0][1])
    assert_close(gradients, expected[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('chunk', [1, 13])
def test_any_chunk_gives_the_same(chunk):
    arrays, reset = draw('matrix', chunk, 40)
    assert_close(call('matrix', arrays, reset=reset, chunk=chunk), call('matrix', arrays, reset=reset))
    assert_close(call('matrix', arrays, chunk=chunk), call('matrix', arrays, implementation='reference'))


@pytest.mark.parametrize('kind', GAINS)
@pytest.mark.parametrize('seed', range(3))
def test_reference_is_the_written_law(kind, seed):
    """Read, then one step on the corrected error: the equations, one head and token at a time."""
    length = 6
    arrays, reset = draw(kind, seed, length)
    x = {name: np.asarray(value) for name, value in arrays.items()}
    out, final = np.zeros((B, length, H, P)), np.zeros(x['initial_gain'].shape)
    for b in range(B):
        for h in range(H):
            K = x['initial_gain'][b, h]
            for t in range(length):
                e, alpha, decay = x['e'][b, t, h], x['alpha'][b, t, h], np.exp(x['log_decay'][b, t, h])
                K = np.zeros_like(K) if reset[b, t] else K
                if kind == 'matrix':
                    out[b, t, h] = K @ e
                    phi = e / np.sqrt(e @ e + 1e-6)
                    write = alpha * np.outer(phi, phi)
                    K = decay * K @ (np.eye(P) - write) + write
                else:
                    out[b, t, h] = K * e
                    share = np.minimum(1, e**2 / (np.mean(e**2) + 1e-6))
                    K = decay * (K * (1 - alpha * share) + alpha * share)
            final[b, h] = K
    assert_close(call(kind, arrays, reset=reset, implementation='reference'), (out, final))


@pytest.mark.parametrize('kind', GAINS)
@pytest.mark.parametrize('lengths', [(7, 9, 3), slow((8, 8, 1)), slow((1, 1, 9))], ids=str)
def test_packed_documents_equal_separate_ones(kind, lengths):
    """The trap: a first token must read zero, not the document before it."""
    length = sum(lengths)
    arrays, _ = draw(kind, length, length)
    del arrays['initial_gain']
    starts = np.cumsum((0, *lengths))[:-1]
    reset = jnp.zeros((B, length), bool).at[:, starts].set(True)
    weight = jax.random.normal(jax.random.key(1), arrays['e'].shape)
    options = {'chunk': 8} if kind == 'matrix' else {}

    def separate(arrays):
        parts = [jax.tree.map(lambda x, s=s, n=n: x[:, s : s + n], arrays) for s, n in zip(starts, lengths)]
        return jnp.concatenate([call(kind, part, implementation='reference')[0] for part in parts], 1)

    graded = lambda f: jax.jit(jax.value_and_grad(lambda arrays: jnp.vdot(weight, f(arrays))))(arrays)
    packed = graded(lambda arrays: call(kind, arrays, reset=reset, **options)[0])
    assert_close(packed, graded(separate), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('kind', GAINS)
@pytest.mark.parametrize('cut', [slow(1), 37])
def test_a_call_in_two_equals_one_call(kind, cut):
    arrays, reset = draw(kind, cut, 45)
    gain = arrays.pop('initial_gain')
    window = lambda part: jax.tree.map(lambda x: x[:, part], arrays)
    first, state = call(kind, window(slice(cut)) | {'initial_gain': gain}, reset=reset[:, :cut])
    second, state = call(kind, window(slice(cut, None)) | {'initial_gain': state}, reset=reset[:, cut:])
    whole = call(kind, arrays | {'initial_gain': gain}, reset=reset)
    assert_close((jnp.concatenate([first, second], 1), state), whole)


@pytest.mark.parametrize('kind', GAINS)
def test_padding_leaves_the_gain_untouched(kind):
    arrays, _ = draw(kind, 0, 9)
    arrays |= {name: jnp.zeros_like(arrays[name]) for name in ('alpha', 'log_decay')}
    np.testing.assert_allclose(call(kind, arrays)[1], arrays['initial_gain'], rtol=1e-15)


@pytest.mark.parametrize('kind', GAINS)
@pytest.mark.parametrize('seed', range(3))
def test_from_zero_the_corrected_error_never_exceeds_the_error(kind, seed):
    arrays, _ = draw(kind, seed, 50)
    arrays['initial_gain'] = jnp.zeros_like(arrays['initial_gain'])
    read, gain = call(kind, arrays)
    norm = lambda x: jnp.linalg.norm(x, axis=-1)
    assert bool((norm(arrays['e'] - read) <= norm(arrays['e']) * (1 + 1e-12)).all())
    if kind == 'diagonal':
        assert bool(((gain >= 0) & (gain <= 1)).all())


@pytest.mark.parametrize('alpha', [0.1, 0.999])
def test_float32_survives_one_error_repeated(alpha):
    """The worst case of the triangular inverse: equal errors, no forgetting, where power sums cancel."""
    arrays, _ = draw('matrix', 0, 128)
    arrays['e'] = jnp.broadcast_to(arrays['e'][:, :1], arrays['e'].shape)
    arrays['alpha'] = jnp.full_like(arrays['alpha'], alpha)
    arrays['log_decay'] = jnp.zeros_like(arrays['log_decay'])
    exact = call('matrix', arrays, implementation='reference')
    single = call('matrix', jax.tree.map(lambda x: x.astype(jnp.float32), arrays))
    assert single[0].dtype == jnp.float32
    assert_close(single, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', GAINS)
def test_forgetting_everything_and_zero_errors_keep_gradients_finite(kind):
    arrays, _ = draw(kind, 0, 40)
    arrays['log_decay'] = arrays['log_decay'].at[:, ::3].set(-500.0)
    arrays['e'] = arrays['e'].at[:, 5:9].set(0.0)
    arrays = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    (_, outputs), gradients = outputs_and_gradients(kind, arrays)
    expected = outputs_and_gradients(kind, arrays, implementation='reference')
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))
    assert_close(outputs, expected[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', GAINS)
def test_long_bfloat16_gradients_are_finite(kind):
    arrays, reset = draw(kind, 0, 4096)
    arrays = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
    (_, (read, gain)), gradients = outputs_and_gradients(kind, arrays, reset=reset)
    assert read.dtype == gain.dtype == jnp.float32
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize('kind', GAINS)
def test_errors_name_the_argument(kind):
    gain = inspect.unwrap(GAINS[kind])  # below the tests' own check of annotations
    arrays, _ = draw(kind, 0, 3)
    e, alpha, log_decay = arrays['e'], arrays['alpha'], arrays['log_decay']
    known = 'mosaic_gpu, chunked, reference'  # the best first
    with pytest.raises(ValueError, match=f"no implementation 'cuda'; available here: {known}$"):
        gain(e, alpha, log_decay, implementation='cuda')
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run here: it needs an NVIDIA GPU, and this is for cpu"):
        gain(e, alpha, log_decay, implementation='mosaic_gpu')
    with pytest.raises(ValueError, match=r'alpha has shape \(2, 2, 2\), expected \(2, 3, 2\)'):
        gain(e, alpha[:, :2], log_decay)
    with pytest.raises(ValueError, match=r'initial_gain has shape \(1,\), expected \(2, 2, 6'):
        gain(e, alpha, log_decay, initial_gain=jnp.zeros(1))
    with pytest.raises(ValueError, match=r'e has shape \(2, 3, 12\), expected \[batch'):
        gain(e.reshape(2, 3, 12), alpha, log_decay)
