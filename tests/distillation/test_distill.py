"""A distilled run comes nearer to its Hyena run with every mode and is a run itself; what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixcon_jax import cli, derived
from mixcon_jax import config as configs
from mixcon_jax.data import open_dataset
from mixcon_jax.distillation.distill import compare, distill
from mixcon_jax.distillation.filters import distilled
from mixcon_jax.inference.load import load_model
from mixcon_jax.models import accounting, decoder
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import Buffer
from mixcon_jax.runs.checkpoints import Meta
from mixcon_jax.trees import from_state
from tests.tiny import tiny_config

HYENA = {
    'model__pattern': ('hyena+mlp', 'attention', 'long|mlp'), 'model__num_blocks': 2, 'model__hyena__max_len': 32,
    'model__layers': {'long': {'kind': 'hyena', 'order': 3}}, 'model__hyena__filter_width': 16,
}  # fmt: skip


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run of initial weights, which takes no training to make."""
    folder = tmp_path_factory.mktemp('hyena')
    config = configs.validate(tiny_config(folder, **HYENA))
    dataset = open_dataset(config)
    _, *states = nnx.split(decoder.create(config.model), nnx.Param, Buffer)
    trees = {name: from_state(state) for name, state in zip(('params', 'buffers'), states, strict=True)}
    meta = Meta(2, config.to_dict(), dataset.tokenizer.to_json(), dataset.identity, 512)
    derived.write(folder / 'run', config, trees, meta, 'nothing')
    return folder / 'run'


@pytest.fixture(scope='module')
def written(run):
    """A distilled run, its fits, the divergence and what was said."""
    said: list[str] = []
    return run.parent / 'out', *distill(run, run.parent / 'out', order=12, rows=8, say=said.append), said


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(list(map(str, arguments)))
    return end.value.code, capsys.readouterr()


@pytest.mark.slow  # the fit itself is tested faster
def test_what_was_written_is_a_run_of_modal_layers(run, written, capsys):
    out, fits, found, said = written
    before, after = load_model(run), load_model(out)
    assert list(after.config.model.pattern) == ['distilled+mlp', 'attention', 'long|mlp'] and after.step == before.step
    assert {name: group.kind for name, group in after.config.model.layers.items()} == dict.fromkeys(
        ('distilled', 'long'), 'hyena_modal'
    )
    assert [(fit.layer, fit.index) for fit in fits] == [(0, 0), (2, 0), (2, 1), (3, 0), (5, 0), (5, 1)]
    assert all(0 < fit.error <= fit.worst < 0.5 for fit in fits) and found.tokens > 0
    assert len(said) == len(fits) + 2 and f'{found.tokens:,} tokens' in said[-2]
    sizes = [accounting.state_bytes(after.config.model, length) for length in (64, 128)]
    cache = accounting.state_bytes(after.config.model, 64 + 64) - sizes[0]
    assert sizes[1] - sizes[0] == cache  # of attention alone: the modal layers have the same at any length
    code, (text, _) = command(capsys, 'generate', '--workdir', out, '--max-new-tokens', 3, '--prompt', 'the')
    assert code == 0 and text.startswith('the')


def test_the_checkpoint_has_a_new_optimizer_of_its_own_parameters(written):
    contents = json.loads((written[0] / 'checkpoints' / '2' / 'meta' / 'metadata').read_text())['contents']
    moments = {name.split('/mu/')[1] for name in contents['arrays'] if '/mu/' in name}
    assert moments == {name.removeprefix('params/') for name in contents['arrays'] if name.startswith('params/')}
    assert not [name for name in moments if 'filter_' in name] and contents['tokens_seen'] > 0


def test_the_models_come_together_with_their_filters():
    """Of large weights, by which the filters matter."""
    config = configs.default()
    config.model.update(dim=16, vocab_size=61, init_std=0.5, pattern=('hyena',), num_blocks=2)
    config.model.hyena.update(max_len=32, filter_width=16, implementation='reference')
    config = configs.validate(config)
    model, whole, rng = decoder.create(config.model), Context.whole(2, 32), np.random.default_rng(0)
    batch = {name: rng.integers(0, 61, (2, 32)).astype(np.int32) for name in ('tokens', 'targets')}
    batch |= {'segment_ids': whole.segment_ids, 'positions': whole.positions, 'loss_mask': rng.random((2, 32)) < 0.7}
    found = []
    for order in (1, 5, 14):
        modal, trees, _ = distilled(model, config, order, 0.1)
        found.append(compare(model, derived.built(modal.model, trees), [batch]))
    assert found[0].kl > 2 * found[1].kl > 4 * found[2].kl > 0, found
    tokens, models = jnp.asarray(batch['tokens']), (model, derived.built(modal.model, trees))
    scores = [jax.nn.log_softmax(each.logits(each(tokens, whole)[0])) for each in models]
    before, after = (np.asarray(score, np.float64)[batch['loss_mask']] for score in scores)
    targets = batch['targets'][batch['loss_mask']]
    want = [np.sum(np.exp(before) * (before - after), 1).mean()]
    want += [-score[np.arange(len(targets)), targets].mean() for score in (before, after)]
    np.testing.assert_allclose([found[2].kl, found[2].before, found[2].after], want, rtol=1e-3)
    assert found[2].tokens == len(targets) and compare(model, model, [batch]).kl == 0


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--order', '-1'], '--order -1 must be at least 0'),
        (['--tolerance', '1'], '--tolerance 1.0 must be between 0 and 1, exclusive'),
        (['--rows', '0'], '--rows 0 must be at least 1'),
        (['--config.model.dim=3'], 'unknown argument --config.model.dim=3; see `mixcon distill-filters --help`'),
        (['--step', '1'], 'there is no checkpoint 1'),
        (['--out', '{run}'], 'is there already; name a new folder'),
        (['--out', ''], '--out is empty; name a folder'),
        (['--workdir', '{run}/none'], 'does not exist'),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(run, capsys, arguments, message):
    given = ['--workdir', run, '--out', run.parent / 'refused', *(text.format(run=run) for text in arguments)]
    code, (out, error) = command(capsys, 'distill-filters', *given)
    assert code == 2 and message in error and error.count('\n') == 1 and not out
    assert not (run.parent / 'refused').exists()


def test_a_run_without_hyena_is_refused(written, capsys):
    code, (_, error) = command(capsys, 'distill-filters', '--workdir', written[0], '--out', written[0].parent / 'twice')
    assert code == 2 and 'is a hyena: there is nothing to distill' in error
