"""The loss and its gradient compiled for an H100 that is not there: how often logits go through memory."""

import jax
import jax.numpy as jnp
import pytest

from mixcon_jax import loss
from mixcon_jax.planning import hlo
from mixcon_jax.planning.compiling import compile_for, devices

TOKENS, WIDTH, VOCABULARY = 1024, 64, 4096

pytestmark = pytest.mark.filterwarnings('ignore:Error reading persistent compilation cache')


def reads_of_the_logits():
    """Kernels that read the array of all tokens and words in float32, which one kernel writes."""
    shape = lambda kind, *sizes: jax.ShapeDtypeStruct(sizes, kind)
    graded = jax.value_and_grad(lambda *arrays: loss.cross_entropy(*arrays, chunk=TOKENS).total, (0, 1))
    compiled = compile_for(
        devices('h100')[0], graded, shape(jnp.bfloat16, 1, TOKENS, WIDTH), shape(jnp.float32, WIDTH, VOCABULARY),
        shape(jnp.int32, 1, TOKENS), shape(jnp.bool_, 1, TOKENS),
    )  # fmt: skip
    found, logits = hlo.kernels(compiled.as_text()), f'f32[{TOKENS},{VOCABULARY}]'
    assert sum(kernel.shape.startswith(logits) for kernel in found) == 1
    return sum(any(operand.startswith(logits) for operand in kernel.operands) for kernel in found)


def test_logits_are_written_once_and_read_twice(monkeypatch):
    """For what is summed over the vocabulary and for the gradient; a row's highest logit alone takes another pass."""
    assert reads_of_the_logits() == 2
    monkeypatch.setattr(loss, '_by_one_reduction', loss._by_three)
    assert reads_of_the_logits() > 2
