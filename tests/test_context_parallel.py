"""A training step whose devices share sequences equals one device; what they exchange does not grow with length."""

import jax
import numpy as np
import pytest

from mixcon_jax import step
from mixcon_jax.planning.collectives import collectives, of_sequence
from mixcon_jax.trees import named_leaves
from tests.training import mesh_of, random_batch, step_config

LENGTH = 16
# A large epsilon, so that Adam does not blow up rounding where gradients vanish: see test_step.py.
OPTIONS = {
    'model__pattern': ('conba+moe', 'attention+mlp'),
    'model__num_blocks': 1,
    'model__conba__head_dim': 8,
    'model__conba__gain_chunk': 4,
    'model__ssm__d_state': 4,
    'model__ssm__chunk': 2,
    'model__moe__implementation': 'grouped',
    'model__moe__group_block': 4,
    'model__remat': 'block',
    'data__seq_len': LENGTH,
    'train__accum_steps': 2,
    'train__z_loss_coef': 0.001,
    'optim__eps': 1.0,
    'optim__learning_rate': 1.0,
}


def two_steps(devices, **mesh):
    """State, metrics and scores after two steps on documents that start anywhere."""
    config = step_config(**OPTIONS, **{f'mesh__{axis}': size for axis, size in mesh.items()})
    steps = step.make_steps(config, mesh_of(config, devices))
    state, metrics = steps.init_state(), []
    for seed in (1, 2):
        batch = steps.put(random_batch(seed, 8, LENGTH))
        state, more = steps.train_step(state, batch)
        metrics.append(jax.device_get(more))
    # Scoring takes rows of any length: 13 tokens do not split over two devices, and stay whole.
    scores = [steps.eval_step(state, steps.put(random_batch(3, 8, length))) for length in (LENGTH, 13)]
    return jax.device_get(state), metrics, jax.device_get(scores)


@pytest.mark.slow  # of every mixer by itself, tests/models/test_context_parallel.py asks the same
def test_a_step_on_shared_sequences_equals_one_device():
    """Rows over data, tokens over context; two microbatches, experts, attention, rematerialised."""
    want, got = named_leaves(two_steps(1)), named_leaves(two_steps(4, data=2, context=2))
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow  # every layer by itself is not
def test_what_a_step_exchanges_does_not_grow_with_the_sequence():
    """Convolution, scan, experts and loss; only attention reads all tokens. Sums are of gradients and metrics."""
    options = OPTIONS | {'model__pattern': ('mamba+moe',), 'train__accum_steps': 1, 'model__dtype': 'bfloat16'}
    exchanged = []
    for length in (32, 64):
        config = step_config(**options | {'data__seq_len': length}, mesh__data=2, mesh__context=2)
        steps = step.make_steps(config, mesh_of(config, 4))
        batch = steps.put(random_batch(0, 8, length))
        module = steps.train_step.lower(steps.abstract_state, batch).compile().as_text()
        exchanged.append(of_sequence(collectives(module)))
    assert exchanged[0] == exchanged[1] > 0
