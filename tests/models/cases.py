"""Every layer that the shared invariants run over, at a small size and away from its initial values.

Every registered kind has a case by itself, under its own name; here stand those with options that change what it does.
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mixcon_jax import config as configs
from mixcon_jax.errors import ConfigError
from mixcon_jax.models import accounting, kinds, pattern, presets
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Parameters

DIM = 32

# name -> (what a pattern calls the layer, options below config.model), beside or in place of the registered kinds' own
OTHERS = {
    'attention': ('attention', {'attention.block_size': 8}),
    'attention_rope': ('attention', {'attention.rope': True, 'attention.block_size': 8}),
    'attention_named': (
        'local',
        {
            'layers.local': {'kind': 'attention', 'rope': True, 'rope_dim': 2, 'num_kv_heads': 4},
            'attention.block_size': 8,
        },
    ),
    'attention_window': (
        'attention',
        {f'attention.{k}': v for k, v in (('window', 5), ('sinks', True), ('logit_cap', 3.0), ('qk_norm', True))}
        | {'attention.block_size': 4},
    ),
    'mamba_norms': ('mamba', {'mamba.norms': True, 'ssm.chunk': 5}),
    'conba_paper': ('conba', {f'conba.{k}': v for k, v in presets.conba('conba_paper').items()}),
    'conba_code': ('conba', {f'conba.{k}': v for k, v in presets.conba('conba_code').items()}),
    'conba_diag': ('conba', {'conba.control': 'diag', 'conba.reference': 'proj', 'conba.state_scaling': 'none'}),
    'conba_companion': ('conba', {'conba.delay': 'companion', 'conba.kappa': 'bounded', 'conba.gate': 'mamba'}),
    'conba_feedback_companion': (
        'conba',
        {
            'conba.delay': 'companion',
            'conba.feedback_iters': 1,
            'conba.control': 'diag',
            'conba.state_scaling': 'readout',
        },
    ),
    'conba_slow_feedback': ('conba', {'conba.control': 'slow', 'conba.feedback_iters': 1, 'conba.delay': 'none'}),
    'moe_dense': ('moe', {'moe.implementation': 'dense'}),
    'moe_grouped': ('moe', {'moe.implementation': 'grouped', 'moe.group_block': 4, 'moe.renormalize': True}),
    'moe_bias': ('moe', {'moe.balance': 'bias'}),
    'moe_switch': ('moe', {'moe.expert': 'relu', 'moe.top_k': 1, 'moe.expert_capacity': 1.0, 'moe.shared_experts': 1}),
    'moe_mamba_all': (
        'moe_mamba',
        {'moe_mamba.projections': ('conv', 'gate', 'output'), 'moe.expert': 'relu', 'moe.top_k': 1}
        | {'moe.implementation': 'grouped', 'moe.group_block': 4},
    ),
    'mamba2_one_group': ('mamba2', {'mamba2.groups': 1}),
    'hyena_order_3': ('hyena', {'hyena.order': 3}),
    'hyena_modal_order_3': ('hyena_modal', {'hyena_modal.order': 3}),
    'large_kernel_merged': ('large_kernel', {'large_kernel.merged': True, 'large_kernel.kernel': 31}),
    'large_kernel_plain': ('large_kernel', {'large_kernel.squeeze': 0}),
}


def model_config(options=(), dtype='float32'):
    """Returns a small, validated ``config.model`` with dotted options set."""
    config = configs.default()
    config.model.update(dim=DIM, vocab_size=64, dtype=dtype)
    config.model.attention.update(num_heads=4, num_kv_heads=2)
    config.model.ssm.update(d_state=8, dt_rank=4, chunk=4)  # short chunks compile faster
    config.model.conba.update(head_dim=16, gain_chunk=8, taps=(1, 3))
    config.model.mamba2.update(d_state=8, head_dim=16, groups=2, chunk=4)
    config.model.retnet.update(chunk=8)
    config.model.gla.update(chunk=8)
    config.model.rwkv6.update(chunk=8, mix_rank=4, decay_rank=4)
    config.model.rwkv7.update(chunk=8, decay_rank=4, rate_rank=4, gate_rank=8)
    config.model.hyena.update(max_len=24, features=5, filter_width=8, block=8)
    config.model.hyena_modal.update(chunk=8)
    config.model.mlp.hidden_dim = 48
    for key, value in dict(options).items():
        configs.put(config, f'model.{key}', value)
    return configs.validate(config).model


def of_every_kind():
    """The case of every registered kind, by its name: its defaults, as far as they fit the width of these models."""
    layers = {name: name for name in kinds.names('mixer')} | {name: f'attention+{name}' for name in kinds.names('ffn')}
    return {name: (name, fitting(layer)) for name, layer in layers.items()}


def fitting(layer):
    """Options that pass the checks of a pattern's layer: whole numbers that these refuse are halved till they pass."""
    options = {'pattern': (layer,)}
    while True:
        try:
            model_config(options)
        except ConfigError as error:
            refused = re.match(r'model\.(\w+\.\w+)=(\d+) ', str(error))
            if refused is None or int(refused[2]) < 2:
                raise
            options[refused[1]] = int(refused[2]) // 2
        else:
            return options


CASES = of_every_kind() | OTHERS
# Computed by the code of others: retention is Mamba-2's primitive and RWKV-6 is on gla's, Conba's forms are those of
# conba and conba_paper, experts those of moe and moe_grouped.
SELDOM = (
    'mamba2_one_group', 'hyena_order_3', 'hyena_modal_order_3', 'large_kernel_merged', 'large_kernel_plain', 'retnet',
    'rwkv6', 'attention_named', 'conba_code', 'conba_diag', 'conba_companion', 'conba_feedback_companion', 'moe_dense',
    'conba_slow_feedback', 'mamba_norms', 'moe_bias', 'moe_switch', 'moe_mamba_all',
)  # fmt: skip


def but_slow(*slow):
    """All cases, of which those named here and SELDOM's are left to `make test-all`."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow + SELDOM else name for name in CASES]


def perturbed(module, seed, scale=0.3):
    """Moves every parameter and buffer away from its initial value, so that no mechanism is switched off."""
    graphdef, variables = nnx.split(module)
    leaves, treedef = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [leaf + scale * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))


@functools.cache
def layer(name, dtype='float32', seed=0):
    """Returns the named layer, perturbed."""
    called, options = CASES[name]
    if dtype == 'bfloat16':  # the tests at 4096 tokens: tiles as in real runs
        options = options | {'attention.block_size': 256, 'conba.gain_chunk': 32, 'ssm.chunk': 0}
        options |= {f'{name}.chunk': 64 for name in ('mamba2', 'retnet', 'gla', 'rwkv6', 'rwkv7')}
    config = model_config(options, dtype)
    kind = kinds.load(pattern.named_kinds(config).get(called, called))
    return perturbed(kind(pattern.variant(config, called), Parameters(jax.random.key(seed)), 4), seed + 1)


@functools.cache
def runner(name, dtype='float32'):
    """Returns ``run(x, context, state)`` of the named layer, jitted once for the whole test session."""
    graphdef, variables = nnx.split(layer(name, dtype))
    apply = jax.jit(lambda variables, x, context, state: nnx.merge(graphdef, variables)(x, context, state))
    return functools.partial(apply, variables)


@functools.partial(jax.jit, static_argnums=0)
def _called(graphdef, variables, args):
    return nnx.merge(graphdef, variables)(*args)


def called(module, *args):
    """`module(*args)`, compiled as a whole: op by op each would be compiled by itself."""
    return _called(*nnx.split(module), args)


def packed_context(lengths, total):
    """Documents of the given lengths one after another, then padding up to ``total`` tokens; one row."""
    segments = [i + 1 for i, n in enumerate(lengths) for _ in range(n)]
    positions = [t for n in lengths for t in range(n)]
    padding = total - len(segments)
    return Context(
        segment_ids=jnp.array([segments + [0] * padding], jnp.int32),
        positions=jnp.array([positions + [0] * padding], jnp.int32),
    )


@contextlib.contextmanager
def traced_once():
    """Within, the parameters of a model are traced once, however often they are counted."""
    trace, known = accounting.parameters, {}

    def parameters(model):
        key = model.to_json(sort_keys=True)
        if key not in known:
            known[key] = tuple(trace(model))
        return iter(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounting, 'parameters', parameters)
        yield
