"""The published models by name: what they weigh, what a token costs, and what decoding keeps."""

import json
from typing import Any

from mixcon_jax import config as configs
from mixcon_jax.models import accounting
from mixcon_jax.models.sizes import SIZES, Size
from mixcon_jax.units import memory, short

LENGTHS = 4096, 8192  # tokens between which a cache's growth is counted; whole tiles of it
HEAD = (
    f'{"preset":14} {"parameters":>15} {"a token uses":>15} {"FLOPs":>6} {"state":>9} {"a token":>9}  source\n'
    f'{"":14} {"":>15} {"":>15} {"":>6} {"":>9} {"adds":>9}'
)
FOOT = (
    'FLOPs: of a token, forward, in rows of 4096. state: of one sequence while decoding, as bfloat16 models keep it;\n'
    'each token adds what attention caches. Train one with --config experiments/presets.py:NAME'
)


def figures(size: Size) -> dict[str, Any]:
    """Counts of a published model, none of whose arrays is made; bytes are of one sequence."""
    config = configs.default()
    config.model.update(size.options)
    config.model.dtype = 'bfloat16'
    model = configs.validate(config).model
    counts, (short_cache, long_cache) = (
        accounting.parameter_count(model),
        (accounting.state_bytes(model, n) for n in LENGTHS),
    )
    a_token = (long_cache - short_cache) / (LENGTHS[1] - LENGTHS[0])
    return {
        'parameters': counts.total,
        'active': counts.active,
        'published': size.total,
        'forward_flops_per_token': accounting.flops_per_token(model, LENGTHS[0]) / 3,
        'state_bytes': round(short_cache - a_token * LENGTHS[0]),
        'cache_bytes_per_token': a_token,
        'source': size.source,
    }


def show(as_json: bool) -> None:
    """Prints all of them, a line each, or as one JSON object."""
    if as_json:
        print(json.dumps({name: figures(size) for name, size in SIZES.items()}, indent=1))
        return
    print(HEAD)
    for name, size in SIZES.items():
        found = figures(size)
        counts = f'{found["parameters"]:>15,} {found["active"]:>15,} {short(found["forward_flops_per_token"]):>6}'
        kept = f'{memory(found["state_bytes"]):>9} {memory(found["cache_bytes_per_token"]):>9}'
        print(f'{name:14} {counts} {kept}  {size.source}', flush=True)
    print(f'\n{FOOT}')
