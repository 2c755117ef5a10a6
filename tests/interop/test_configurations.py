"""What a published config.json means here: by the published numbers of parameters, and what is refused."""

import pytest

from mixcon_jax import config as configs
from mixcon_jax.errors import UserError
from mixcon_jax.interop.configurations import context, model_options
from mixcon_jax.models.accounting import parameter_count
from mixcon_jax.models.sizes import SIZES

MAMBA = {
    'model_type': 'mamba', 'hidden_size': 768, 'intermediate_size': 1536, 'expand': 2, 'state_size': 16,
    'conv_kernel': 4, 'time_step_rank': 48, 'num_hidden_layers': 24, 'vocab_size': 50280, 'layer_norm_epsilon': 1e-5,
    'use_bias': False, 'use_conv_bias': True, 'hidden_act': 'silu',
}  # fmt: skip
# Of this one `expand` says something else than `intermediate_size`, which counts.
FALCON_MAMBA = MAMBA | {
    'model_type': 'falcon_mamba', 'hidden_size': 4096, 'intermediate_size': 8192, 'expand': 16, 'time_step_rank': 256,
    'num_hidden_layers': 64, 'vocab_size': 65024, 'mixer_rms_eps': 1e-6, 'tie_word_embeddings': False,
}  # fmt: skip
MAMBA2 = {
    'model_type': 'mamba2', 'hidden_size': 768, 'num_heads': 24, 'head_dim': 64, 'state_size': 128, 'n_groups': 1,
    'expand': 2, 'conv_kernel': 4, 'num_hidden_layers': 24, 'vocab_size': 50288, 'layer_norm_epsilon': 1e-5,
    'time_step_limit': [0.0, float('inf')],
}  # fmt: skip
LLAMA = {
    'model_type': 'llama', 'hidden_size': 4096, 'intermediate_size': 11008, 'num_attention_heads': 32,
    'num_key_value_heads': 32, 'num_hidden_layers': 32, 'vocab_size': 32000, 'rms_norm_eps': 1e-5, 'rope_scaling': None,
    'hidden_act': 'silu', 'tie_word_embeddings': False,
}  # fmt: skip
MIXTRAL = LLAMA | {
    'model_type': 'mixtral', 'intermediate_size': 14336, 'num_key_value_heads': 8, 'num_local_experts': 8,
    'num_experts_per_tok': 2, 'rope_theta': 1e6, 'sliding_window': None,
}  # fmt: skip
JAMBA = {
    'model_type': 'jamba', 'hidden_size': 4096, 'intermediate_size': 14336, 'num_attention_heads': 32,
    'num_key_value_heads': 8, 'num_hidden_layers': 32, 'attn_layer_period': 8, 'attn_layer_offset': 4,
    'expert_layer_period': 2, 'expert_layer_offset': 1, 'num_experts': 16, 'num_experts_per_tok': 2,
    'mamba_d_state': 16, 'mamba_d_conv': 4, 'mamba_expand': 2, 'mamba_dt_rank': 256, 'mamba_conv_bias': True,
    'mamba_proj_bias': False, 'rms_norm_eps': 1e-6, 'vocab_size': 65536, 'tie_word_embeddings': False,
}  # fmt: skip
BAMBA = {
    'model_type': 'bamba', 'hidden_size': 4096, 'intermediate_size': 14336, 'num_attention_heads': 32,
    'num_key_value_heads': 8, 'num_hidden_layers': 32, 'attn_layer_indices': [9, 18, 27], 'mamba_n_heads': 128,
    'mamba_d_head': 64, 'mamba_n_groups': 1, 'mamba_d_state': 128, 'mamba_d_conv': 4, 'mamba_expand': 2,
    'vocab_size': 128256, 'rms_norm_eps': 1e-5, 'tie_word_embeddings': False,
}  # fmt: skip

RWKV = {
    'model_type': 'rwkv', 'hidden_size': 768, 'num_hidden_layers': 12, 'vocab_size': 50277, 'layer_norm_epsilon': 1e-5,
    'attention_hidden_size': None, 'intermediate_size': None, 'tie_word_embeddings': False,
}  # fmt: skip


def options_of(values):
    """`config.model` of a config.json."""
    config = configs.default()
    config.model.update(model_options(values))
    config.model.tie_embeddings = values.get('tie_word_embeddings', True)
    return configs.resolve(configs.validate(config)).model


def bamba_parameters():
    """By hand: matrices of the mixers, then what each has besides, the MLPs, norms, embedding and head."""
    D, inner, keys, heads = 4096, 8192, 128, 128
    mamba = D * (2 * inner + 2 * keys + heads) + inner * D + 5 * (inner + 2 * keys) + 3 * heads + inner
    attention = D * 4096 * 2 + D * 1024 * 2
    return 29 * mamba + 3 * attention + 32 * (3 * D * 14336 + 2 * D) + 2 * 128256 * D + D


@pytest.mark.parametrize(
    'values, total',
    [
        (MAMBA, SIZES['mamba-130m'].total),
        (FALCON_MAMBA, 7_272_665_088),
        (MAMBA2, 128_989_632),
        (LLAMA, SIZES['llama2-7b'].total),
        (MIXTRAL, SIZES['mixtral-8x7b'].total),
        (JAMBA, SIZES['jamba-v0.1'].total),
        (BAMBA, bamba_parameters()),
        (RWKV, 2 * 50277 * 768 + 13 * 768**2 * 12 + 768 * (11 * 12 + 4)),
    ],
    ids=lambda value: value['model_type'] if isinstance(value, dict) else '',
)
def test_published_configurations_have_their_parameters(values, total):
    assert parameter_count(options_of(values)).total == total


def test_layers_repeat_in_the_shortest_pattern():
    jamba, bamba = options_of(JAMBA), options_of(BAMBA)
    assert (jamba.num_blocks, jamba.pattern) == (4, SIZES['jamba-v0.1'].options['pattern'])
    assert bamba.num_blocks == 1 and [i for i, x in enumerate(bamba.pattern) if 'attention' in x] == [9, 18, 27]
    dense = options_of(JAMBA | {'num_experts': 1})
    assert not [layer for layer in dense.pattern if 'moe' in layer]


def test_rotary_positions_in_older_and_newer_files():
    newer = {'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5, 'partial_rotary_factor': 0.25}}
    older = {'rope_theta': 5e5, 'partial_rotary_factor': 0.5}
    found = [options_of(values).attention for values in (LLAMA, LLAMA | older, LLAMA | newer, BAMBA)]
    assert [(a.rope, a.rope_theta, a.rope_dim) for a in found] == [
        (True, 1e4, 0), (True, 5e5, 64), (True, 5e5, 32), (True, 1e4, 64),
    ]  # fmt: skip
    assert not options_of(JAMBA).attention.rope
    assert (
        options_of({name: value for name, value in MIXTRAL.items() if name != 'rope_theta'}).attention.rope_theta == 1e6
    )


@pytest.mark.parametrize('values, tokens', [
    ({'max_position_embeddings': 512}, 512), ({'max_position_embeddings': 131072}, 2048),
    ({'context_length': 1024}, 1024), ({}, 2048), ({'max_position_embeddings': 'x'}, 2048),
    ({'max_position_embeddings': 1}, 2),
])  # fmt: skip
def test_text_is_scored_in_rows_that_the_model_was_made_for(values, tokens):
    assert context({'model_type': 'llama'} | values) == tokens


def test_norms_of_falcon_mamba_have_no_scales_and_an_epsilon_of_their_own():
    model = options_of(FALCON_MAMBA)
    assert (model.mamba.norms, model.mamba.norm_scales, model.mamba.norm_eps) == (True, False, 1e-6)
    assert model.norm_eps == 1e-5


@pytest.mark.parametrize(
    'values, message',
    [
        (LLAMA | {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, r"of type 'llama3' of llama have no c"),
        (LLAMA | {'rope_scaling': {'type': 'linear', 'factor': 2.0}}, r"of type 'linear' of llama have no counterpart"),
        (
            LLAMA | {'rope_parameters': {'rope_type': 'default'}, 'rope_scaling': {'rope_type': 'dynamic'}},
            r"of type 'dynamic' of llama have no c",
        ),
        (LLAMA | {'attention_bias': True}, r'attention_bias=True of llama has no counterpart here, only False'),
        (LLAMA | {'mlp_bias': True}, r'mlp_bias=True of llama'),
        (MIXTRAL | {'sliding_window': 4096}, r'sliding_window of mixtral has not been compared; only null'),
        (MAMBA | {'use_conv_bias': False}, r'use_conv_bias=False of mamba has no counterpart here, only True'),
        (MAMBA | {'intermediate_size': 1000}, r'an inner width of 1000 of mamba is no multiple of hidden_size'),
        (MAMBA2 | {'time_step_limit': [0.0, 0.1]}, r'time_step_limit of mamba2 has no counterpart here'),
        (BAMBA | {'mamba_proj_bias': True}, r'mamba_proj_bias=True of bamba'),
        (JAMBA | {'mamba_conv_bias': False}, r'mamba_conv_bias=False of jamba'),
        (MIXTRAL | {'hidden_size': '4096'}, r"hidden_size='4096' of mixtral must be a positive integer$"),
        (LLAMA | {'num_hidden_layers': 0}, r'num_hidden_layers=0 of llama must be a positive integer$'),
        (BAMBA | {'rope_parameters': {'partial_rotary_factor': 0.0}}, r'=0\.0 of bamba must be a positive'),
        (BAMBA | {'rope_parameters': {'partial_rotary_factor': 1e-3}}, r'partial_rotary_factor of bamba leaves no'),
        (LLAMA | {'rope_scaling': [1]}, r'rope_scaling=\[1\] of llama must be an object$'),
        (LLAMA | {'rope_theta': 'big'}, r"rope_theta='big' of llama must be a positive number$"),
        (LLAMA | {'rms_norm_eps': '1e-5'}, r"rms_norm_eps='1e-5' of llama must be a positive number$"),
        (JAMBA | {'mamba_dt_rank': 'many'}, r"mamba_dt_rank='many' of jamba must be a positive integer$"),
        ({'model_type': ['llama']}, r"model_type \['llama'\] cannot be imported"),
        (MAMBA2 | {'time_step_limit': 5}, r'time_step_limit of mamba2 has no counterpart here'),
        (RWKV | {'layer_norm_epsilon': 1e-6}, r'layer_norm_epsilon=1e-06 of rwkv has no counterpart here, only 1e-05'),
        ({'model_type': 'llama', 'hidden_size': 8}, r'the config\.json of llama lacks vocab_size$'),
        ({}, r'model_type None cannot be imported; choose from bamba, falcon_mamba, jamba, llama, mamba, mamba2, mix'),
    ],
)  # fmt: skip
def test_what_ours_lacks_is_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        model_options(values)
