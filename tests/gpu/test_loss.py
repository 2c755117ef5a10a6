"""The loss and its gradient compiled for an H100 that is not there: how often logits go through memory."""

import jax
import jax.numpy as jnp
import pytest

from mixcon_jax import loss
from mixcon_jax.planning import hlo
from mixcon_jax.planning.compiling import compile_for, devices

CHUNKS, TOKENS, WIDTH, VOCABULARY = 2, 512, 64, 4096  # tokens a chunk

pytestmark = pytest.mark.filterwarnings('ignore:Error reading persistent compilation cache')


def reads_of_the_logits():
    """Kernels a chunk that read its logits, the float32 array of all its tokens and words, which one kernel writes."""
    shape = lambda kind, *sizes: jax.ShapeDtypeStruct(sizes, kind)
    graded = jax.value_and_grad(lambda *arrays: loss.cross_entropy(*arrays, chunk=TOKENS).total, (0, 1))
    compiled = compile_for(
        devices('h100')[0], graded, shape(jnp.bfloat16, CHUNKS, TOKENS, WIDTH), shape(jnp.float32, WIDTH, VOCABULARY),
        shape(jnp.int32, CHUNKS, TOKENS), shape(jnp.bool_, CHUNKS, TOKENS),
    )  # fmt: skip
    found, logits = hlo.kernels(compiled.as_text()), f'f32[{TOKENS},{VOCABULARY}]'
    assert sum(kernel.count for kernel in found if kernel.shape.startswith(logits)) == CHUNKS
    reading = (kernel for kernel in found if any(operand.startswith(logits) for operand in kernel.operands))
    return sum(kernel.count for kernel in reading) / CHUNKS


def test_logits_are_written_once_and_read_twice(monkeypatch):
    """For what is summed over the vocabulary and for the gradient; three reductions take more."""
    assert reads_of_the_logits() == 2
    monkeypatch.setattr(loss, '_by_one_reduction', loss._by_three)
    assert reads_of_the_logits() > 2
