"""`mixcon import` of what transformers' `save_pretrained` writes: a run whose logits are those of transformers.

`make parity` imports the folders themselves. The committed fixtures have their config.json; the weights, by the names
that files have, are written here.
"""

import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from mixcon_jax import cli
from mixcon_jax.errors import UserError
from mixcon_jax.inference.load import load_model
from mixcon_jax.interop.importing import import_model
from mixcon_jax.models.context import Context
from tests.parity import cases

FAST = ('bamba', 'mixtral')
MODELS = [
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
    for name in ('bamba', 'falcon_mamba', 'jamba', 'llama', 'mamba', 'mamba2', 'mixtral', 'rwkv')
]


def of_files(weights):
    """The modules' weights as `save_pretrained` names them: an expert by itself, Mixtral's by names of their own."""
    found = {}
    for name, value in weights.items():
        if '.experts.' not in name:
            found[name.replace('.mlp.gate.', '.block_sparse_moe.gate.')] = value
            continue
        layer, _, matrices = name.partition('.experts.')
        names = ('gate_proj', 'up_proj') if matrices == 'gate_up_proj' else ('down_proj',)
        for expert, both in enumerate(value):
            for matrix, part in zip(names, np.split(both, len(names)), strict=True):
                found[f'{layer}.experts.{expert}.{matrix}.weight'] = part
    old = {'mlp.experts': 'block_sparse_moe.experts', 'gate_proj': 'w1', 'up_proj': 'w3', 'down_proj': 'w2'}
    for name in [name for name in found if '.mlp.experts.' in name]:
        renamed = name
        for new, before in old.items():
            renamed = renamed.replace(new, before)
        found[renamed] = found.pop(name)
    return found


def saved(name, folder):
    """A folder as `save_pretrained` writes it, and a tokenizer of as many words as the fixtures' models know."""
    source = cases.FIXTURES / f'{name}_model'
    shutil.copytree(source, folder)
    if not (folder / 'model.safetensors').exists():
        save_file(of_files(cases.below(cases.fixture(f'{name}_model'), 'w')), folder / 'model.safetensors')
    words = {'<|endoftext|>': 0} | {f'w{i}': i for i in range(1, 61)}
    (folder / 'tokenizer.json').write_text(tokenizers.Tokenizer(tokenizers.models.WordLevel(words, 'w1')).to_str())
    return folder


@pytest.mark.parametrize('name', MODELS)
def test_an_imported_model_has_the_published_logits(name, tmp_path, capsys):
    folder = saved(name, tmp_path / 'published')
    with pytest.raises(SystemExit, match='0'):
        cli.main(['import', '--from', str(folder), '--out', str(tmp_path / 'run')])
    theirs = cases.fixture(f'{name}_model')
    count = sum(weight.size for key, weight in theirs.items() if key.startswith('w/'))
    assert f' {count:,} parameters of ' in capsys.readouterr().out
    trained = load_model(tmp_path / 'run')
    assert trained.step == 0 and trained.tokenizer.vocab_size == trained.config.model.vocab_size == 61
    model = trained.model
    y = jax.jit(lambda tokens: model.logits(model(tokens, Context.whole(*tokens.shape))[0]))(theirs['tokens'])
    cases.assert_same(np.asarray(y), theirs['y'], 'the logits')


@pytest.mark.parametrize(
    'change, message',
    [
        ({'model_type': 'gpt2'}, "model_type 'gpt2' cannot be imported; choose from bamba, falcon_mamba, jamba"),
        ({'hidden_act': 'gelu'}, "hidden_act='gelu' of bamba has no counterpart here, only 'silu'"),
        ({'num_hidden_layers': 1, 'attn_layer_indices': []}, 'there is a layer 1 from bamba, but the model has 1'),
        ({'intermediate_size': 64}, 'ffn/w_down of shape (1, 48, 32), where its config.json says (1, 64, 32)'),
        ({'vocab_size': 60}, 'embedding of shape (61, 32), where its config.json says (60, 32)'),
        (None, 'has no config.json that can be read; give the folder of a published model'),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line(change, message, tmp_path, capsys):
    folder = saved('bamba', tmp_path / 'published')
    values = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text('' if change is None else json.dumps(values | change))
    with pytest.raises(SystemExit, match='2'):
        cli.main(['import', '--from', str(folder), '--out', str(tmp_path / 'run')])
    assert message in capsys.readouterr().err and not (tmp_path / 'run').exists()


def test_a_token_that_ends_texts_there_and_not_here_is_said(tmp_path):
    folder, lines = saved('mixtral', tmp_path / 'published'), []
    for name, ends, said in (('config.json', [5, 7], True), ('generation_config.json', [9, 0], False)):
        values = json.loads((folder / 'config.json').read_text())
        (folder / name).write_text(json.dumps(values | {'eos_token_id': ends}))
        import_model(folder, tmp_path / name, say=lines.append)
        told = f"{folder} ends texts with token 5, 7; here '<|endoftext|>', 0, begins and ends documents, so that"
        assert any(line.startswith(told) for line in lines) == said
        lines.clear()


def test_a_tokenizer_that_is_another_models_is_refused(tmp_path):
    folder, other = saved('bamba', tmp_path / 'published'), tmp_path / 'tokenizer.json'
    words = {'</s>': 0} | {f'w{i}': i for i in range(1, 62)}
    other.write_text(tokenizers.Tokenizer(tokenizers.models.WordLevel(words, 'w1')).to_str())
    with pytest.raises(UserError, match=r'has 62 tokens, but the model of .* an embedding of 61 rows: name its own'):
        import_model(folder, tmp_path / 'run', other)
    (folder / 'tokenizer.json').unlink()
    with pytest.raises(UserError, match=r'published/tokenizer\.json: No such file'):
        import_model(folder, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
