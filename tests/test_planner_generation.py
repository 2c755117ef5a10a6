"""`mixcon plan --what prefill` and `decode`: what runs, where its state lies, and how much of it there is to do."""

import re

import jax
import pytest
from flax import nnx

from kernels_pallas.attention.xla import tile_size
from mixcon_jax import config as configs
from mixcon_jax.inference.generate import state_shardings
from mixcon_jax.models import accounting
from mixcon_jax.models.decoder import abstract
from mixcon_jax.parallel.axes import AXES
from mixcon_jax.planner import compiled, programs, search, words
from tests.planning import SMALL, configuration, planned, stub


def test_a_search_for_generation_varies_the_mesh_alone(monkeypatch):
    stub(monkeypatch)
    config = configs.default()
    for key, value in SMALL.items():
        configs.put(config, key, value)
    job = {'target': 'h100', 'hosts': 1, 'per_host': 4, 'what': 'decode', 'batch': 1, 'context': 0}
    found = search.search(config, job, ['cublas'], 3 * 2**20, 1000, lambda line: None)
    assert len({one['sets'] for one in found['plans']}) == len(found['plans']) > 3
    assert not [one['sets'] for one in found['plans'] if 'remat' in one['sets'] or 'accum' in one['sets']]


def test_rounds_that_only_data_tell_are_those_of_the_device_with_most_to_do():
    options = {'data.seq_len': 16384, 'train.batch_size': 4, 'mesh.context': 4, 'model.moe.num_experts': 8}
    config, mesh = configuration(4, options), jax.make_mesh((1, 1, 1, 4, 1), AXES)
    tile = 16384 // tile_size(16384) // 4  # blocks of a shard
    rounds = programs.unknown_rounds(config, mesh)
    assert rounds('jit(attention)/while') == sum(3 * tile + i + 1 for i in range(tile))
    one = jax.make_mesh((1, 1, 1, 1, 1), AXES, devices=jax.devices()[:1])
    prefill, decode = (programs.unknown_rounds(config, one, what, 2, 4096) for what in ('prefill', 'decode'))
    blocks = 4096 // tile_size(4096)
    assert prefill('jit(attention)/while') == blocks * (blocks + 1) / 2 and decode('jit(attention)/while') == 1
    # Two choices a token: blocks of 128 rows, and half of one more an expert.
    assert rounds('jit(grouped_matmul)/while') == 4 * 4096 * 2 / 128 + 4
    assert prefill('jit(grouped_matmul)/while') == 2 * 4096 * 2 / 128 + 4


def test_generation_counts_a_full_cache_and_the_last_tokens_logits():
    config = configuration(1, {})
    model, matrices = config.model, 2 * (64 * (64 + 64 + 2 * 32) + 3 * 64 * 128)
    decode, prefill = (compiled.counts(config, what, 3, 4096) for what in ('decode', 'prefill'))
    head, scores = 64 * 512, 2 * 64  # products of a token; of a token and a key, with values
    assert decode['flops'] == 3 * 2 * (matrices + head + 2 * 4096 * scores)
    assert prefill['flops'] == 2 * (3 * 4096 * (matrices + 2 * 2048 * scores) + 3 * head)
    assert decode['exponentials'] == 3 * (accounting.exponentials_per_token(model, 2 * 4096)[0] - 512)


def test_states_are_shared_out_by_rows_and_by_nothing_that_looks_like_them():
    """Hyena's filters, as long as there are rows, are whole everywhere, and are counted once for all rows."""
    model = configuration(8, {'model.pattern': ('hyena', 'attention+mlp'), 'mesh.data': 8}).model
    module = nnx.split(abstract(model))
    mesh = jax.make_mesh((8, 1, 1, 1, 1), AXES)
    found = state_shardings(*module, 8, 8, mesh)['blocks'][0]
    leaves = {jax.tree_util.keystr(path): one.spec for path, one in jax.tree_util.tree_leaves_with_path(found)}
    whole = {name for name, spec in leaves.items() if not spec}
    assert {re.findall(r'\w+', name)[-1] for name in whole} == {'taps', 'length'} and len(leaves) > len(whole)
    assert all(not one.spec for one in jax.tree.leaves(state_shardings(*module, 6, 8, mesh))), 'six over eight'
    one, eight, sixteen = (accounting.state_bytes(model, 8, rows) for rows in (1, 8, 16))
    shared = 2 * 4 * (8 * 64 + 1)  # of one filter and a length in each of two blocks
    assert eight - shared == 8 * (one - shared) and sixteen - shared == 16 * (one - shared)


@pytest.mark.slow
@pytest.mark.parametrize('what', ['prefill', 'decode'])
def test_generation_compiles(what):
    found = planned(1, 2, (('mesh.fsdp', 2), ('model.pattern', ('conba+mlp', 'attention+moe'))), what)
    assert found['fits'] and found['model']['tokens'] == (2 * 64 if what == 'prefill' else 2)
    assert found['gradients'] == found['moments'] == 0 < found['model']['state_bytes']
    # Two sequences on two devices; a length is whole on both.
    assert 0 <= 2 * found['state'] - found['model']['state_bytes'] < 64
    assert any('state ' in line for line in words.lines(found))


@pytest.mark.slow
def test_generation_of_experts_on_a_mesh_has_room_for_all():
    options = ('mesh.expert', 2), ('model.pattern', ('attention+moe',)), ('data.seq_len', 128)
    tight, wide = (planned(1, 2, (*options, ('model.moe.capacity', room)), 'prefill') for room in (1.0, 0.0))
    assert tight['cublas']['peak'] == wide['cublas']['peak']
