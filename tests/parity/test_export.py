"""`mixcon export`: of an imported model, the weights that transformers' `save_pretrained` wrote, name by name.

That transformers loads what is exported of models made here is for `make parity` to say (exports.py).
"""

import json

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file
from tokenizers import processors

from mixcon_jax import cli
from mixcon_jax import config as configs
from mixcon_jax.data.tokenizer import Tokenizer
from mixcon_jax.errors import UserError
from mixcon_jax.interop import configurations, descriptions, exporting, huggingface, weight_files
from mixcon_jax.interop.exporting import export_model
from mixcon_jax.interop.importing import import_model, read
from tests.parity.test_import import MODELS, saved


@pytest.mark.parametrize('name', MODELS)
def test_an_imported_model_is_exported_as_it_was(name, tmp_path, capsys):
    folder, run, out = saved(name, tmp_path / 'published'), tmp_path / 'run', tmp_path / 'exported'
    import_model(folder, run)
    with pytest.raises(SystemExit, match='0'):
        cli.main(['export', '--workdir', str(run), '--out', str(out)])
    before, after = (load_file(each / 'model.safetensors') for each in (folder, out))
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, err_msg=key)
    theirs, ours = (json.loads((each / 'config.json').read_text()) for each in (folder, out))
    assert configurations.model_options(ours) == configurations.model_options(theirs)
    assert {key: ours[key] for key in ('architectures', 'model_type', 'tie_word_embeddings')} == {
        key: theirs[key] for key in ('architectures', 'model_type', 'tie_word_embeddings')
    }
    assert 'in float32' in capsys.readouterr().out
    again, found = read(out)
    assert again.model == read(folder)[0].model and found.keys() == read(folder)[1].keys()


def test_of_several_files_each_holds_its_part_and_bfloat16_rounds_to_nearest(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f'a{i}': rng.normal(size=(3, 100)).astype(np.float32) for i in range(5)}
    weight_files.write_model(tmp_path, iter(arrays.items()), 'bfloat16', part=1500)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3)), 'model.safetensors.index.json',
    ]  # fmt: skip
    index = json.loads((tmp_path / weight_files.INDEX).read_text())
    assert index['metadata']['total_size'] == 5 * 600 and list(index['weight_map']) == list(arrays)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    found = weight_files.read_model(tmp_path)
    for name, value in arrays.items():
        np.testing.assert_allclose(found[name].astype(np.float32), value, rtol=2**-8)
        assert found[name].dtype.name == 'bfloat16'


RWKV = {'norm': 'layer', 'norm_eps': 1e-5, 'embedding_norm': True}


def config_of(**changes):
    config = configs.default()
    config.model.update(pattern=('attention+mlp',), num_blocks=2)
    config.model.attention.rope = True
    for key, value in changes.items():
        configs.put(config, f'model.{key.replace("__", ".")}', value)
    return configs.resolve(configs.validate(config))


@pytest.mark.parametrize(
    'changes, architecture',
    [
        ({}, 'llama'),
        ({'tie_embeddings': True, 'init_std': 0.1, 'remat': 'block', 'dtype': 'bfloat16'}, 'llama'),
        ({'attention__rope': False}, 'jamba'),
        ({'attention__rope_dim': 16}, 'bamba'),
        ({'pattern': ('attention+moe',), 'moe__renormalize': True, 'moe__balance': 'none'}, 'mixtral'),
        ({'pattern': ('mamba', 'mamba')}, 'mamba'),
        ({'pattern': ('mamba',), 'mamba__norms': True, 'mamba__norm_scales': False}, 'falcon_mamba'),
        ({'pattern': ('mamba+mlp', 'mamba+mlp'), 'mamba__norms': True}, 'jamba'),
        ({'pattern': ('mamba2+mlp', 'attention+mlp'), 'mamba2__expand': 4}, 'bamba'),
    ],
)
def test_the_architecture_is_the_one_that_computes_the_same(changes, architecture):
    """Also where options that are of learning alone have other values than a published model's."""
    assert descriptions.describe(config_of(**changes))['model_type'] == architecture


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'attention__window': 8}, r'; the nearest, llama, has model\.attention\.window=0, not 8$'),
        ({'attention__qk_norm': True}, r'llama, has model\.attention\.qk_norm=False, not True'),
        ({'norm': 'layer'}, r"llama, has model\.norm='rms', not 'layer'"),
        ({'shortcut__reduction': 4}, r'llama, has model\.shortcut\.reduction=0, not 4'),
        ({'dim': 40, 'attention__num_heads': 6, 'attention__head_dim': 8}, r'a model\.dim that .*num_heads divides'),
        (
            {
                'pattern': ('rwkv4+rwkv_channel_mix',),
                'norm': 'layer',
                'norm_eps': 1e-5,
                'embedding_norm': True,
                'num_blocks': 1,
            },
            r'rwkv, has several layers, not 1$',
        ),
        ({'pattern': ('conba+mlp',)}, r'^no published architecture has the layers conba\+mlp; there are llama: atten'),
        ({'pattern': ('attention|mlp',)}, r'^no published architecture has the layers attention\|mlp; '),
        (
            {'pattern': ('mamba+mlp', 'attention+mlp', 'attention+mlp')},
            r'jamba, has mamba\+mlp for layer 1, not attent',
        ),
        (
            {'pattern': ('attention+moe',), 'moe__shared_experts': 1},
            r'nearest, \w+, has .*moe\.shared_experts=0, not 1',
        ),
    ],
)
def test_what_no_published_architecture_computes_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        descriptions.describe(config_of(**changes))


def test_every_share_of_a_head_that_rotates_is_read_as_it_was():
    for head_dim in range(4, 130, 2):
        for rope_dim in range(2, head_dim + 1, 2):
            config = config_of(attention__num_heads=2, attention__head_dim=head_dim, attention__rope_dim=rope_dim)
            share = descriptions.WRITERS['bamba'].values(config.model, ['attention+mlp'])['partial_rotary_factor']
            assert int(head_dim * share) == rope_dim and (share == 0.5 or rope_dim != head_dim / 2)


BOS = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])


@pytest.mark.parametrize('processor, begins', [(None, 2), (processors.ByteLevel(trim_offsets=False), 2), (BOS, 1)])
def test_an_exported_tokenizer_begins_texts_as_training_does_unless_it_has_its_own_way(processor, begins):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0, '<s>': 1, '</s>': 2}, 'a'))
    made.add_special_tokens(['<s>', '</s>'])
    if processor is not None:
        made.post_processor = processor
    text, token = exporting._beginning_documents(Tokenizer(made))
    backend = tokenizers.Tokenizer.from_str(text)
    assert backend.encode('a').ids == [begins, 0] and token == backend.id_to_token(begins)
    assert processor is BOS or backend.encode('a', 'a').ids == [begins, 0, begins, 0]


def test_every_architecture_that_can_be_imported_can_be_exported():
    assert descriptions.WRITERS.keys() == configurations.READERS.keys() == huggingface.ARCHITECTURES.keys()


def test_what_cannot_be_exported_leaves_nothing_behind(tmp_path, monkeypatch):
    import_model(saved('mixtral', tmp_path / 'published'), tmp_path / 'run')
    (tmp_path / 'there').mkdir()
    (tmp_path / 'there' / 'file').touch()
    with pytest.raises(UserError, match='is there already; name a new folder'):
        export_model(tmp_path / 'run', tmp_path / 'there')

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(weight_files, 'save_file', full)
    with pytest.raises(UserError, match=r'0\.part cannot be written: .*No space left'):
        export_model(tmp_path / 'run', tmp_path / 'out')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['published', 'run', 'there']
