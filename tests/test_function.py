"""Which options decide what a model's weights compute, as every layer of a pattern reads them."""

import pytest

from mixcon_jax import config as configs
from mixcon_jax import function


def config_of(layers=None, **options):
    config = configs.default()
    for name, given in (layers or {}).items():
        config.model.layers[name] = given
    for key, value in options.items():
        configs.put(config, f'model.{key.replace("__", ".")}', value)
    return configs.resolve(configs.validate(config))


NAMED = {'pattern': ('local+mlp', 'attention+mlp'), 'layers': {'local': {'kind': 'attention', 'window': 8}}}


@pytest.mark.parametrize(
    'one, other, wanted',
    [
        ({}, {'attention__window': 4, 'hyena__order': 3}, {'model.attention.window': (0, 4)}),  # no layer is a hyena
        ({}, {'init_std': 0.1, 'dtype': 'bfloat16', 'moe__balance': 'none', 'remat': 'block'}, {}),
        ({}, {'attention__rope_theta': 5e5}, {}),
        (
            {'attention__rope': True},
            {'attention__rope': True, 'attention__rope_theta': 5e5},
            {'model.attention.rope_theta': (1e4, 5e5)},
        ),
        ({'pattern': ('hyena',)}, {'pattern': ('hyena',), 'hyena__frequency': 10.0, 'hyena__filter_rate': 0.5}, {}),
        ({'pattern': ('mamba',)}, {'pattern': ('conba',)}, {'model.pattern': (('mamba',), ('conba',))}),
        (NAMED, NAMED, {}),
        (
            NAMED,
            NAMED | {'layers': {'local': {'kind': 'attention', 'window': 9}}},
            {'model.layers.local.window': (8, 9)},
        ),
        (NAMED, NAMED | {'attention__qk_norm': True}, {
            'model.attention.qk_norm': (False, True), 'model.layers.local.qk_norm': (False, True),
        }),
        ({'layers': NAMED['layers']}, {}, {}),  # which no layer of the pattern is
        ({'shortcut__reduction': 4}, {}, {'model.shortcut.reduction': (4, 0)}),
    ],
)  # fmt: skip
def test_what_differs_is_what_the_patterns_layers_read(one, other, wanted):
    assert function.differences(config_of(**one), config_of(**other)) == wanted
