"""Safetensors files: a model's arrays come back, whatever their type and in however many files; damage is named."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mixcon_jax.errors import UserError
from mixcon_jax.interop.weight_files import read_model


def arrays():
    rng = np.random.default_rng(0)
    types = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
    found = {f'a.{np.dtype(each).name}': rng.normal(size=(3, 5)).astype(each) for each in types}
    return found | {'number': np.array(2.5, np.float32), 'none': np.zeros((0, 4), np.float32)}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_arrays_come_back(tmp_path):
    save_file(arrays(), tmp_path / 'model.safetensors')
    same(read_model(tmp_path), arrays())


def test_a_model_in_several_files(tmp_path):
    parts, expected = ('one.safetensors', 'two.safetensors'), arrays()
    where = {name: parts[i % 2] for i, name in enumerate(expected)}
    for part in parts:
        save_file({name: value for name, value in expected.items() if where[name] == part}, tmp_path / part)
    index = tmp_path / 'model.safetensors.index.json'
    index.write_text(json.dumps({'metadata': {}, 'weight_map': where}))
    same(read_model(tmp_path), expected)
    index.write_text(json.dumps({'weight_map': where | {'lost': 'two.safetensors'}}))
    with pytest.raises(UserError, match=r'index\.json lists lost, which two\.safetensors does not hold$'):
        read_model(tmp_path)
    index.write_text(json.dumps({'weight_map': ['one']}))
    with pytest.raises(UserError, match='has no weight_map of file names'):
        read_model(tmp_path)


@pytest.mark.parametrize(
    'damage',
    [
        lambda raw: raw[:-1],
        lambda raw: raw[:40],
        lambda raw: raw[:5],
        lambda raw: b'',
        lambda raw: raw[:8] + b'[' + raw[9:],
        lambda raw: raw.replace(b'"dtype"', b'"dtypo"'),
        lambda raw: raw.replace(b'"BF16"', b'"FP8 "'),
        lambda raw: raw.replace(b'[3,5]', b'[3,6]'),
    ],
)
def test_a_damaged_file_is_refused_by_name(damage, tmp_path):
    path = tmp_path / 'model.safetensors'
    save_file({'whole': arrays()['a.float32'], 'last': arrays()['a.bfloat16']}, path)
    damaged = damage(path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r'model\.safetensors is no intact safetensors file: '):
        read_model(tmp_path)


def test_weights_of_another_kind_are_refused(tmp_path):
    with pytest.raises(UserError, match=r'no file .*model\.safetensors; weights are read from safetensors files alone'):
        read_model(tmp_path)


@pytest.mark.parametrize('dtype', ['I8', 'F8_E4M3'])
def test_other_types_are_refused_by_name(dtype, tmp_path):
    header = json.dumps({'a': {'dtype': dtype, 'shape': [3], 'data_offsets': [0, 3]}}).encode()
    (tmp_path / 'model.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + b'abc')
    with pytest.raises(UserError, match=rf'^a in .*model\.safetensors is of type {dtype}; ours are read from F64'):
        read_model(tmp_path)
