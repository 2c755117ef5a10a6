"""Published models by name, as options of ``config.model``: `mixcon presets` lists them, experiments/presets.py trains.

Sizes are those of the papers or of the released configurations. What a paper does not say is this project's: initial
values.
"""

from typing import Any, NamedTuple

from mixcon_jax.models.presets import MOE_MAMBA, conba, hybrid, moe_mamba


class Size(NamedTuple):
    """A published model.

    Attributes:
      options: of ``config.model``.
      source: the paper, or what was released.
      total: parameters that were published to the last one; None where they were not, or where ours are not the same.
    """

    options: dict[str, Any]
    source: str
    total: int | None = None


_SHARED = {'tie_embeddings': True, 'norm_eps': 1e-5}  # the embedding is the output head, too


def _mamba(dim: int, layers: int, total: int) -> Size:
    return Size(
        {'dim': dim, 'num_blocks': layers, 'pattern': ('mamba',), 'vocab_size': 50280} | _SHARED,
        'Gu and Dao, 2023',
        total,
    )


def _mamba2(dim: int, layers: int) -> Size:
    options = {'dim': dim, 'num_blocks': layers, 'pattern': ('mamba2',), 'vocab_size': 50288} | _SHARED
    return Size(options, 'Dao and Gu, 2024')


def _llama(dim: int, layers: int, heads: int, kv_heads: int, hidden: int, **others: Any) -> dict[str, Any]:
    """Attention with rotary positions in every layer, an output head of its own."""
    return {
        'dim': dim,
        'num_blocks': layers,
        'pattern': ('attention+mlp',),
        'vocab_size': 32000,
        'tie_embeddings': False,
        'norm_eps': 1e-5,
        'attention': {'num_heads': heads, 'num_kv_heads': kv_heads, 'rope': True},
        'mlp': {'hidden_dim': hidden},
    } | others


def _retnet(dim: int, layers: int) -> Size:
    """Its FFN has two matrices of 2 dim; the MLP's three have as many parameters at 4/3 dim, to a row."""
    options = {
        'dim': dim,
        'num_blocks': layers,
        'pattern': ('retnet+mlp',),
        'vocab_size': 50257,
        'retnet': {'num_heads': dim // 256},
        'mlp': {'hidden_dim': round(4 * dim / 3)},
    } | _SHARED
    return Size(options, 'Sun et al., 2023; SwiGLU of as many parameters, words of GPT-2')


def _rwkv4(dim: int, layers: int) -> Size:
    options = {
        'dim': dim,
        'num_blocks': layers,
        'pattern': ('rwkv4+rwkv_channel_mix',),
        'vocab_size': 50277,
        'tie_embeddings': False,
        'norm': 'layer',
        'norm_eps': 1e-5,
        'embedding_norm': True,
    }
    return Size(options, 'Peng et al., 2023')


def _pangu_pi(dim: int, layers: int, heads: int, hidden: int) -> Size:
    options = _llama(dim, layers, heads, heads, hidden, pattern=('attention+series_mlp',), vocab_size=100000)
    return Size(options | {'shortcut': {'reduction': 32}}, 'Wang et al., 2023; words and FFN to about its size')


# Released code says half of these, the shares that it balances summing to top_k and not to 1: docs/models.md.
_JAMBAS_BALANCE, _MIXTRALS_BALANCE = 2e-3, 0.04
_MIXCON = {
    'dim': 4096,
    'num_blocks': 4,
    'pattern': hybrid(attention=2, conba=6, moe_every=2),
    'vocab_size': 262144,
    'attention': {'num_heads': 32, 'num_kv_heads': 2},
    'mlp': {'hidden_dim': 14336},
    'moe': {'num_experts': 16, 'top_k': 2, 'hidden_dim': 14336, 'balance_coef': _JAMBAS_BALANCE},
    'conba': conba(),
}
_JAMBA = ('mamba+mlp', 'mamba+moe', 'mamba+mlp', 'mamba+moe', 'attention+mlp', 'mamba+moe', 'mamba+mlp', 'mamba+moe')

SIZES: dict[str, Size] = {
    'mixcon': Size(_MIXCON, 'Xu et al., 2024, with the widths of the released code'),
    'conba': Size(_MIXCON | {'num_blocks': 32, 'pattern': ('conba+mlp',)}, 'MixCon without attention and experts'),
    'mamba-130m': _mamba(768, 24, 129_135_360),
    'mamba-370m': _mamba(1024, 48, 371_516_416),
    'mamba-790m': _mamba(1536, 48, 793_204_224),
    'mamba-1.4b': _mamba(2048, 48, 1_372_178_432),
    'mamba-2.8b': _mamba(2560, 64, 2_768_345_600),
    'mamba2-130m': _mamba2(768, 24),
    'mamba2-370m': _mamba2(1024, 48),
    'mamba2-780m': _mamba2(1536, 48),
    'mamba2-1.3b': _mamba2(2048, 48),
    'mamba2-2.7b': _mamba2(2560, 64),
    'jamba-v0.1': Size(
        _MIXCON
        | {
            'pattern': _JAMBA,
            'vocab_size': 65536,
            'tie_embeddings': False,
            'attention': {'num_heads': 32, 'num_kv_heads': 8},
            'mamba': {'norms': True},
        },
        'Lieber et al., 2024',
        51_570_323_328,
    ),
    'mixtral-8x7b': Size(
        _llama(4096, 32, 32, 8, 14336, pattern=('attention+moe',))
        | {
            'attention': {'num_heads': 32, 'num_kv_heads': 8, 'rope': True, 'rope_theta': 1e6},
            'moe': {
                'num_experts': 8,
                'top_k': 2,
                'hidden_dim': 14336,
                'renormalize': True,
                'balance_coef': _MIXTRALS_BALANCE,
            },
        },
        'Jiang et al., 2024',
        46_702_792_704,
    ),
    'llama2-7b': Size(_llama(4096, 32, 32, 32, 11008), 'Touvron et al., 2023', 6_738_415_616),
    'llama2-70b': Size(_llama(8192, 80, 64, 8, 28672), 'Touvron et al., 2023', 68_976_648_192),
    'striped-hyena-7b': Size(
        _llama(4096, 32, 32, 8, 14336)
        | {
            'num_blocks': 16,
            'pattern': ('hyena_modal+mlp', 'attention+mlp'),
            'attention': {'num_heads': 32, 'num_kv_heads': 8, 'rope': True, 'rope_theta': 5e5},
            'hyena_modal': {'d_state': 2},
        },
        'Together, 2023',
    ),
    'pangu-pi-1b': _pangu_pi(2048, 12, 16, 5504),
    'pangu-pi-7b': _pangu_pi(4096, 29, 32, 11008),
    'retnet-1.3b': _retnet(2048, 24),
    'retnet-2.7b': _retnet(2560, 32),
    'retnet-6.7b': _retnet(4096, 32),
    'rwkv4-169m': _rwkv4(768, 12),
    'rwkv4-430m': _rwkv4(1024, 24),
    'rwkv4-1.5b': _rwkv4(2048, 24),
    'rwkv4-3b': _rwkv4(2560, 32),
    'rwkv4-7b': _rwkv4(4096, 32),
    'rwkv4-14b': _rwkv4(5120, 40),
} | {name: Size(moe_mamba(name), 'Pióro et al., 2024') for name in MOE_MAMBA if name.startswith('moe-mamba')}


def size(name: str) -> Size:
    """The published model of a name.

    Raises:
      ValueError: an unknown name.
    """
    if name not in SIZES:
        raise ValueError(f'unknown preset {name!r}; choose from {", ".join(SIZES)}')
    return SIZES[name]
