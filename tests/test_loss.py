"""The chunked cross-entropy against log_softmax over all logits, in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mixcon_jax import config as configs
from mixcon_jax import loss
from mixcon_jax.loss import cross_entropy
from mixcon_jax.parallel import layout
from mixcon_jax.parallel.axes import RULES
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.parallel.rules import on_mesh
from tests.jaxprs import operations

SIZES = [(1, 1, 3, 5), (3, 7, 5, 11), (4, 13, 8, 257), (2, 64, 16, 33)]  # B, T, D, V


def problem(seed, batch, length, width, vocab):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, length, width)).astype(np.float32)
    head = rng.normal(size=(width, vocab)).astype(np.float32)
    targets = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    mask = rng.random((batch, length)) < 0.7
    return tuple(map(jnp.asarray, (hidden, head, targets, mask)))


def dense(hidden, head, targets, mask, z_coef):
    """The definition, on all logits at once, with its gradients by hand: d nll / d logits = softmax - one-hot."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    targets, mask = np.asarray(targets), np.asarray(mask)
    logits = hidden @ head
    top = logits.max(axis=-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    nll = (lse - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0])[mask].sum()
    z = (lse**2)[mask].sum()
    softmax = np.exp(logits - lse[..., None])
    d_logits = softmax * (1 + 2 * z_coef * lse)[..., None] - np.eye(head.shape[1])[targets]
    d_logits *= mask[..., None]
    correct = (logits.argmax(axis=-1) == targets)[mask].sum()
    return (nll, z, correct), (d_logits @ head.T, np.einsum('btd,btv->dv', hidden, d_logits))


@pytest.mark.parametrize('z_coef', [0.0, 0.03])
@pytest.mark.parametrize('chunk', [1, 5, 1000])
@pytest.mark.parametrize('size', SIZES)
def test_sums_and_gradients_are_those_of_the_dense_form(size, chunk, z_coef):
    hidden, head, targets, mask = problem(sum(size) + chunk, *size)

    def scaled(hidden, head):  # the gradient must follow an outer factor too
        total, nll, z, correct = cross_entropy(hidden, head, targets, mask, chunk=chunk, z_coef=z_coef)
        return 0.37 * total, (nll, z, correct)

    (total, (nll, z, correct)), grads = jax.jit(jax.value_and_grad(scaled, (0, 1), has_aux=True))(hidden, head)
    (want_nll, want_z, want_correct), want_grads = dense(hidden, head, targets, mask, z_coef)
    np.testing.assert_allclose([nll, z], [want_nll, want_z], rtol=1e-5, atol=1e-6)
    assert correct == want_correct
    np.testing.assert_allclose(total, 0.37 * (want_nll + z_coef * want_z), rtol=1e-5, atol=1e-6)
    for got, want in zip(grads, want_grads):
        np.testing.assert_allclose(got, 0.37 * want, rtol=1e-4, atol=2e-5)


@pytest.fixture(params=['cpu', 'gpu'])
def platform(request, monkeypatch):
    """The forms of both platforms, on this one."""
    monkeypatch.setattr(loss.platform, 'platform', lambda: request.param)


@pytest.mark.parametrize('form', [loss._by_three, loss._by_one_reduction])
@pytest.mark.parametrize('seed', range(4))
def test_highest_sum_and_wanted_logit_of_a_row(form, seed):
    """Of logits far apart, which overflow unless the highest is taken out; the highest and the wanted bit for bit."""
    rng = np.random.default_rng(seed)
    shape = (1, int(rng.integers(1, 9)), int(rng.integers(1, 700)))
    logits = (rng.normal(size=shape) * 10.0 ** rng.integers(-3, 5, shape)).astype(np.float32)
    logits[rng.random(shape) < 0.1] = logits.max()  # ties
    hit = np.arange(shape[-1]) == rng.integers(0, shape[-1] + 1, (*shape[:-1], 1))  # or none
    highest, total, wanted = jax.jit(form)(logits, hit)
    np.testing.assert_array_equal(highest, logits.max(-1))
    np.testing.assert_array_equal(wanted, np.where(hit, logits, 0).sum(-1))
    np.testing.assert_allclose(total, np.exp(logits.astype(np.float64) - logits.max(-1)[..., None]).sum(-1), rtol=1e-5)


@pytest.mark.parametrize('form', [loss._by_three, loss._by_one_reduction])
@pytest.mark.parametrize('value', [jnp.nan, jnp.inf])
def test_a_logit_that_is_no_number_leaves_its_rows_loss_none(form, value):
    logits = jnp.zeros((1, 2, 9)).at[0, 1, 4].set(value)
    highest, total, wanted = form(logits, jnp.arange(9) == jnp.zeros((1, 2, 1), jnp.int32))
    assert np.isfinite(jnp.log(total) + highest - wanted).tolist() == [[True, False]]


@pytest.mark.usefixtures('platform')
@pytest.mark.parametrize('rows, tokens, tensor', [(1, 1, 1), (2, 1, 1), (6, 1, 1), (2, 3, 1), (2, 1, 4)])
def test_what_devices_share_out_changes_nothing(rows, tokens, tensor):
    """As the mesh of the step splits the batch: rows, the tokens of a row, or both; and as it splits the vocabulary."""
    hidden, head, targets, mask = problem(3, 6, 9, 7, 32)
    config = configs.default().mesh
    config.update(data=rows, context=tokens, tensor=tensor)
    mesh = make_mesh(config, jax.devices()[: rows * tokens * tensor])

    @jax.value_and_grad
    def total(arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return cross_entropy(*arrays, targets, mask, chunk=4)[0]

    found, grads = jax.jit(total)(jax.device_put((hidden, head), layout.replicated(mesh)))
    (want, *_), want_grads = dense(hidden, head, targets, mask, 0.0)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, tuple(want_grads))


def test_each_device_gets_its_part_of_the_heads_gradient():
    hidden, head, targets, mask = problem(3, 8, 9, 8, 32)
    config = configs.default().mesh
    config.update(data=1, fsdp=4, tensor=2)
    mesh = make_mesh(config, jax.devices())
    parts = NamedSharding(mesh, layout.partition_spec(('embed', 'vocab'), head.shape, mesh, RULES))
    assert parts.spec == PartitionSpec(('fsdp',), ('tensor',))

    def total(head):
        with on_mesh(mesh, RULES):
            return cross_entropy(hidden, head, targets, mask, chunk=4)[0]

    found = jax.jit(jax.grad(total))(jax.device_put(head, parts))
    assert found.sharding.is_equivalent_to(parts, 2)
    np.testing.assert_allclose(found, dense(hidden, head, targets, mask, 0.0)[1][1], rtol=1e-4, atol=1e-5)


def test_without_gradient_the_sums_are_the_same():
    hidden, head, targets, mask = problem(4, 3, 11, 6, 17)
    function = lambda h: cross_entropy(h, head, targets, mask, chunk=7, z_coef=0.1)[0]
    np.testing.assert_allclose(function(hidden), jax.value_and_grad(function)(hidden)[0], rtol=1e-6)


def test_bfloat16_products_leave_float32_sums_and_own_gradient_types():
    hidden, head, targets, mask = problem(5, 4, 16, 32, 101)
    hidden = hidden.astype(jnp.bfloat16)
    function = jax.value_and_grad(lambda h, w: cross_entropy(h, w, targets, mask, chunk=8)[0], (0, 1))
    total, (d_hidden, d_head) = function(hidden, head * 0.1)
    rounded = (head * 0.1).astype(jnp.bfloat16).astype(jnp.float32)
    (want, *_), (want_hidden, want_head) = dense(hidden.astype(jnp.float32), rounded, targets, mask, 0.0)
    assert (total.dtype, d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(total, want, rtol=1e-5)  # logits are float32 sums of bfloat16 products
    np.testing.assert_allclose(d_hidden.astype(jnp.float32), want_hidden, atol=2e-2 * np.abs(want_hidden).max())
    np.testing.assert_allclose(d_head, want_head, atol=2e-2 * np.abs(want_head).max())


def test_a_masked_target_may_be_anything():
    hidden, head, targets, mask = problem(6, 2, 5, 4, 9)
    mask = jnp.zeros_like(mask).at[0, 1].set(True)
    wild = jnp.where(mask, targets, 10**6)
    function = jax.value_and_grad(lambda h, t: cross_entropy(h, head, t, mask, chunk=3)[0])
    for one, other in zip(function(hidden, targets), function(hidden, wild)):
        np.testing.assert_array_equal(one, other)


def test_no_buffer_holds_all_logits():
    """The largest array of the compiled gradient is the head's, or a chunk's logits: far below B T V."""
    batch, length, width, vocab, chunk = 8, 128, 16, 512, 32
    hidden, head, targets, mask = problem(7, batch, length, width, vocab)
    function = jax.value_and_grad(lambda h, w: cross_entropy(h, w, targets, mask, chunk=chunk)[0], (0, 1))
    compiled = jax.jit(function).lower(hidden, head).compile()
    shapes = re.findall(r'(?:pred|[a-z]+[0-9]+)\[([0-9,]+)\]', compiled.as_text())
    largest = max(int(np.prod([int(size) for size in shape.split(',')])) for shape in shapes)
    assert largest <= max(chunk * vocab, batch * length * width)
    assert compiled.memory_analysis().temp_size_in_bytes < batch * length * vocab


@pytest.mark.parametrize(
    'vocab, tensor, tokens',
    [
        (32_768, 1, 8192),
        (50_257, 1, 4096),
        (262_144, 1, 1024),
        (32_768, 2, 16_384),
        (50_257, 2, 4096),  # which 2 does not divide
        (2**30, 1, 1),
    ],
)
def test_a_gpus_chunk_has_up_to_a_gibibyte_of_logits(vocab, tensor, tokens, monkeypatch):
    mesh = configs.default().mesh
    mesh.update(data=1, tensor=tensor)
    with jax.sharding.use_abstract_mesh(make_mesh(mesh, jax.devices()[:tensor]).abstract_mesh):
        assert loss.usual_chunk(vocab) == 1024
        monkeypatch.setattr(loss.platform, 'platform', lambda: 'gpu')
        assert loss.usual_chunk(vocab) == tokens


def test_without_a_number_chunks_are_the_usual_ones(monkeypatch):
    monkeypatch.setattr(loss, 'usual_chunk', lambda vocab: {9: 256}[vocab])
    program = jax.make_jaxpr(cross_entropy)(*problem(8, 3, 200, 4, 9))
    scans = [operation for operation, _ in operations(program.jaxpr) if operation.primitive.name == 'scan']
    assert [scan.params['length'] for scan in scans] == [3]
