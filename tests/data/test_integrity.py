"""`mixcon data verify`: every byte of a store is read, and what differs is named."""

import json
import shutil
from pathlib import Path

import pytest

from mixcon_jax import cli
from mixcon_jax.data import prepare
from mixcon_jax.data.integrity import verify
from mixcon_jax.errors import UserError
from tests.data.test_store import damage


@pytest.fixture
def store(make_config, corpus) -> Path:
    [prepared] = prepare(make_config(corpus[1]).data, progress=False)
    return Path(prepared.path)


def test_whole_stores_pass_and_damage_is_named(store, tmp_path, capsys):
    def run(*paths) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(['data', 'verify', *map(str, paths)])
        return end.value.code, capsys.readouterr().out

    assert verify(str(store))['documents'] == 40
    assert run(store) == run(store.parent) and run(store)[0] == 0
    bad = tmp_path / 'bad'
    shutil.copytree(store, bad)
    damage(bad, 'tokens')  # its size stays
    code, out = run(store, bad)
    assert code == 1 and f'{store}: whole, 40 documents' in out and f'{bad}: damaged token store: tokens' in out
    shutil.rmtree(bad)
    shutil.copytree(store, bad)
    tokenizer = json.loads((bad / 'tokenizer.json').read_text())
    text = json.dumps(tokenizer | {'version': '9.9'})
    (bad / 'tokenizer.json').write_text(text)
    assert run(bad)[0] == 1
    for path in (tmp_path / 'nowhere', tmp_path):
        with pytest.raises(UserError, match='token store'):
            verify(str(path))


def test_the_metadata_is_verified_too(store):
    """Whether it has a checksum of its own, or is from before there was one."""
    path = store / 'metadata.json'
    record = json.loads(path.read_text())
    counts = record['counts'] | {'train': record['counts']['heldout']}
    for key, value in (('eot_id', 7), ('vocab_size', 9), ('counts', counts), ('split', 'cut'), ('skipped', 1)):
        path.write_text(json.dumps(record | {key: value}))
        with pytest.raises(UserError, match=r'damaged token store: metadata.json differs from its checksum'):
            verify(str(store))
        if key in ('eot_id', 'vocab_size', 'counts'):
            path.write_text(json.dumps({k: v for k, v in (record | {key: value}).items() if k != 'checksum'}))
            with pytest.raises(UserError, match=rf'damaged token store: metadata.json has {key} .*, not '):
                verify(str(store))
    path.write_text(json.dumps({key: value for key, value in record.items() if key != 'checksum'}))
    assert verify(str(store))['documents'] == 40


@pytest.mark.parametrize('name', ['', 'nowhere', 'file', 'empty'])
def test_what_is_no_store_is_bad_input(tmp_path, name, capsys):
    (tmp_path / 'file').touch()
    (tmp_path / 'empty').mkdir()
    with pytest.raises(SystemExit) as end:
        cli.main(['data', 'verify', name and str(tmp_path / name)])
    out, err = capsys.readouterr()
    told = 'data.cache_dir' if name else 'STORE is empty'
    assert end.value.code == 2 and not out and err.startswith('error: ') and told in err
