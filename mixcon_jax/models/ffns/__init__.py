"""Channel mixers (FFNs) by the name that a pattern calls them, as in ``mixcon_jax.models.mixers``."""

FFNS: dict[str, str | type] = {
    'mlp': 'mixcon_jax.models.ffns.mlp.MLP',
    'moe': 'mixcon_jax.models.ffns.moe.MoE',
    'rwkv_channel_mix': 'mixcon_jax.models.ffns.rwkv_channel_mix.ChannelMix',
    'series_mlp': 'mixcon_jax.models.ffns.series_mlp.SeriesMLP',
}
