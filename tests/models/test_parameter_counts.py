"""Parameter counts are those of the published models, to the last one, without allocating any of them.

The oracle is arithmetic on the architectures as their authors print them; totals and active counts that the literature
gives rounded are asserted beside it.
"""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from experiments.mixcon import paper
from mixcon_jax import config as configs
from mixcon_jax.models import presets
from mixcon_jax.models.accounting import parameter_count, width_for
from mixcon_jax.models.decoder import create

HEAD = 128  # width of a head in all of these models


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A published model, its sizes as printed; layers are told by index."""

    dim: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    experts: int = 1
    moe_every: int = 1  # layers i with i % moe_every == moe_every - 1 have experts, where there are any
    attention: tuple[int, ...] = (0,)  # layers of a period that attend; the others are Mamba with norms
    period: int = 1
    d_state: int = 16
    d_conv: int = 4
    top_k: int = 2


LLAMA2_7B = Architecture(dim=4096, layers=32, ffn=11008, heads=32, kv_heads=32, vocab=32000)
LLAMA2_70B = Architecture(dim=8192, layers=80, ffn=28672, heads=64, kv_heads=8, vocab=32000)
MIXTRAL = Architecture(dim=4096, layers=32, ffn=14336, heads=32, kv_heads=8, vocab=32000, experts=8)
JAMBA = Architecture(
    dim=4096,
    layers=32,
    ffn=14336,
    heads=32,
    kv_heads=8,
    vocab=65536,
    experts=16,
    moe_every=2,
    attention=(4,),
    period=8,
)
MIXCON = dataclasses.replace(JAMBA, kv_heads=2, vocab=262144, attention=(3, 4))


def counted(a: Architecture) -> tuple[int, int]:
    """Total and active parameters, added up layer by layer."""
    attention = 2 * a.dim * a.heads * HEAD + 2 * a.dim * a.kv_heads * HEAD
    inner, rank = 2 * a.dim, a.dim // 16
    mamba = (
        a.dim * 2 * inner  # in_proj
        + inner * (a.d_conv + 1)  # convolution and its bias
        + inner * (rank + 2 * a.d_state)  # x_proj
        + rank * inner  # dt_proj
        + inner  # its bias
        + inner * a.d_state  # A
        + inner  # D
        + inner * a.dim  # out_proj
        + rank
        + 2 * a.d_state  # the norms of dt, B and C
    )
    expert = 3 * a.dim * a.ffn
    total = active = 2 * a.vocab * a.dim + a.dim  # embedding, head, final norm
    for i in range(a.layers):
        both = (attention if i % a.period in a.attention else mamba) + 2 * a.dim  # with the layer's two norms
        moe = a.experts > 1 and i % a.moe_every == a.moe_every - 1
        router = a.dim * a.experts if moe else 0
        total += both + router + expert * (a.experts if moe else 1)
        active += both + router + expert * (a.top_k if moe else 1)
    return total, active


def model_config(a: Architecture):
    """The same architecture as `config.model`."""
    model = configs.default().model
    names = ['attention' if i % a.period in a.attention else 'mamba' for i in range(max(a.period, a.moe_every))]
    moe = [a.experts > 1 and i % a.moe_every == a.moe_every - 1 for i in range(len(names))]
    model.pattern = tuple(f'{name}+{"moe" if m else "mlp"}' for name, m in zip(names, moe, strict=True))
    model.update(dim=a.dim, vocab_size=a.vocab, num_blocks=a.layers // len(names), tie_embeddings=False)
    model.attention.update(num_heads=a.heads, num_kv_heads=a.kv_heads, head_dim=HEAD)
    model.ssm.update(d_state=a.d_state, d_conv=a.d_conv)
    model.mamba.norms = True
    model.mlp.hidden_dim = a.ffn
    model.moe.update(num_experts=a.experts, top_k=a.top_k, hidden_dim=a.ffn)
    return model


# architecture, exact total, published total and active in billions
PUBLISHED = {
    'Llama-2-7B': (LLAMA2_7B, 6_738_415_616, 6.738, 6.738),
    'Llama-2-70B': (LLAMA2_70B, 68_976_648_192, 68.977, 68.977),
    'Mixtral-8x7B': (MIXTRAL, 46_702_792_704, 46.703, 12.880),
    'Jamba-v0.1': (JAMBA, 51_570_323_328, 51.570, 12.110),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_models(name):
    architecture, exact, total, active = PUBLISHED[name]
    counts = parameter_count(model_config(architecture))
    assert (counts.total, counts.active) == counted(architecture)
    assert counts.total == exact
    assert (round(counts.total / 1e9, 3), round(counts.active / 1e9, 3)) == (total, active)
    assert counts.embedding == 2 * architecture.vocab * architecture.dim
    assert counts.added == 0


def test_mixcon_of_the_paper():
    """52.88 billion, 13.42 of them active, before Conba's own additions, which are counted apart."""
    model = paper.get_config().model
    counts = parameter_count(model)
    total, active = counted(MIXCON)
    assert (counts.total - counts.added, counts.active - counts.added) == (total, active)
    assert (round(total / 1e9, 2), round(active / 1e9, 2)) == (52.88, 13.42)


@pytest.mark.parametrize('kv_heads, billions', [(8, 52.927), (4, 52.894), (2, 52.877)])
def test_mixcon_with_other_key_value_heads(kv_heads, billions):
    model = paper.get_config().model
    model.attention.num_kv_heads = kv_heads
    counts = parameter_count(model)
    assert counts.total - counts.added == counted(dataclasses.replace(MIXCON, kv_heads=kv_heads))[0]
    assert round((counts.total - counts.added) / 1e9, 3) == billions


def test_conba_additions_of_the_paper():
    """What each mechanism of the default preset adds to a Conba layer, written out; 24 layers have it."""
    model = paper.get_config().model
    dim, inner = model.dim, 2 * model.dim
    heads = inner // model.conba.head_dim
    scaling = 2 * inner  # z_s and g
    taps = len(model.conba.taps) * inner
    reference = 2 * inner  # w_r and b_r
    control = 2 * (dim * heads + heads) + heads  # alpha and lambda with their biases, kappa
    gate = 2 * inner  # w_1 and u_2
    assert parameter_count(model).added == 24 * (scaling + taps + reference + control + gate)


@pytest.mark.parametrize('preset', presets.CONBA_PRESETS)
def test_conba_additions_are_small(preset):
    """No preset of the paper's model spends more than three in a hundred of a mixer on its own mechanisms."""
    counts = parameter_count(paper.get_config(preset).model)
    assert 0 < counts.added / 24 < 0.03 * 105.31e6


@pytest.mark.parametrize(
    'pattern', [('conba+moe', 'attention+mlp'), ('mamba+mlp',), ('attention|mlp', 'conba', 'attention+moe')]
)
@pytest.mark.parametrize('tied', [False, True])
def test_counts_are_those_of_an_allocated_model(pattern, tied):
    model = configs.default().model
    model.update(dim=48, vocab_size=101, num_blocks=3, pattern=pattern, tie_embeddings=tied)
    arrays = jax.tree.leaves(nnx.state(create(model), nnx.Param))
    assert parameter_count(model).total == sum(math.prod(array.shape) for array in arrays)


# Which widths depend on the chosen one: the MLP's; the experts', derived from it, rounded down; or the experts' alone.
WIDTHS = {
    'mlp': (('attention+mlp', 'mamba+mlp'), 2, 0, 'mlp.hidden_dim'),
    'mlp and one expert a token': (('attention+mlp', 'attention+moe'), 1, 0, 'mlp.hidden_dim'),
    'mlp and two experts a token': (('attention+mlp', 'mamba+moe'), 2, 0, 'mlp.hidden_dim'),
    'three experts a token': (('attention+moe',), 3, 0, 'mlp.hidden_dim'),
    'experts of their own width': (('attention+moe', 'attention+mlp'), 2, 24, 'moe.hidden_dim'),
}


def test_widths_of_named_experts_are_found():
    """Which have numbers of their own, and so derive other widths from the MLP's."""
    model = configs.default().model
    model.update(dim=16, vocab_size=61, pattern=('attention+moe', 'attention+big'))
    model.attention.update(num_heads=2, num_kv_heads=1)
    model.layers = {'big': {'kind': 'moe', 'top_k': 3, 'num_experts': 5}}
    wanted = model.copy_and_resolve_references()
    wanted.mlp.hidden_dim = 96
    assert width_for(model, parameter_count(wanted).total) == 96


@pytest.mark.parametrize('name', WIDTHS)
def test_no_other_width_comes_nearer_to_the_wanted_parameters(name):
    pattern, top_k, expert, key = WIDTHS[name]
    model = configs.default().model
    model.update(dim=16, vocab_size=61, pattern=pattern)
    model.attention.update(num_heads=2, num_kv_heads=1)
    model.moe.update(num_experts=3, top_k=top_k, hidden_dim=expert)
    before = model.to_dict()

    def total(width: int) -> int:
        trial = configs.default()
        trial.model = model.copy_and_resolve_references()
        configs.put(trial, f'model.{key}', width)
        return parameter_count(trial.model).total

    wanted = total(41) + 333
    width = width_for(model, wanted, key)
    assert model.to_dict() == before
    distance = {other: abs(total(other) - wanted) for other in range(width - top_k - 1, width + top_k + 2)}
    assert distance[width] == min(distance.values())


def test_a_width_that_cannot_be_had_is_refused():
    model = configs.default().model
    model.update(dim=16, vocab_size=61, pattern=('attention+mlp',))
    model.attention.update(num_heads=2, num_kv_heads=1)
    with pytest.raises(ValueError, match=r'at model\.mlp\.hidden_dim=1, more than the 1,000'):
        width_for(model, 1000)
    with pytest.raises(ValueError, match=r'model\.moe\.hidden_dim changes no number of parameters'):
        width_for(model, 100_000, 'moe.hidden_dim')
