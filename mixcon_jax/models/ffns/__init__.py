"""Channel mixers (FFNs) by the name that a pattern calls them, as in ``mixcon_jax.models.mixers``."""

FFNS: dict[str, str | type] = {
    'mlp': 'mixcon_jax.models.ffns.mlp.MLP',
    'moe': 'mixcon_jax.models.ffns.moe.MoE',
    'series_mlp': 'mixcon_jax.models.ffns.series_mlp.SeriesMLP',
}
