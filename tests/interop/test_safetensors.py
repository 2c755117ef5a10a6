"""Safetensors files: a model's arrays come back, whatever their type and in however many files; damage is named."""

import json

import ml_dtypes
import numpy as np
import pytest

from mixcon_jax.errors import UserError
from mixcon_jax.interop import safetensors

NAMES = {'float64': 'F64', 'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16', 'int32': 'I32'}


def write(path, arrays):
    """Writes a file as its format is described, by itself."""
    header, data = {'__metadata__': {'format': 'pt'}}, b''
    for name, value in arrays.items():
        raw = np.ascontiguousarray(value).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {'dtype': NAMES[value.dtype.name], 'shape': list(value.shape), 'data_offsets': offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + data)


def arrays():
    rng = np.random.default_rng(0)
    types = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
    found = {f'a.{np.dtype(each).name}': rng.normal(size=(3, 5)).astype(each) for each in types}
    return found | {'number': np.float32(2.5).reshape(()), 'none': np.zeros((0, 4), np.float32)}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_arrays_come_back(tmp_path):
    write(tmp_path / 'model.safetensors', arrays())
    same(safetensors.read_model(tmp_path), arrays())


def test_a_model_in_several_files(tmp_path):
    parts, expected = ('one.safetensors', 'two.safetensors'), arrays()
    where = {name: parts[i % 2] for i, name in enumerate(expected)}
    for part in parts:
        write(tmp_path / part, {name: value for name, value in expected.items() if where[name] == part})
    index = tmp_path / 'model.safetensors.index.json'
    index.write_text(json.dumps({'metadata': {}, 'weight_map': where}))
    same(safetensors.read_model(tmp_path), expected)
    index.write_text(json.dumps({'weight_map': where | {'lost': 'two.safetensors'}}))
    with pytest.raises(UserError, match=r'index\.json lists lost, which two\.safetensors does not hold$'):
        safetensors.read_model(tmp_path)
    index.write_text(json.dumps({'weight_map': ['one']}))
    with pytest.raises(UserError, match='has no weight_map of file names'):
        safetensors.read_model(tmp_path)


@pytest.mark.parametrize(
    'damage, message',
    [
        (lambda raw: raw[:-1], r'bytes \d+ to \d+ of \d+ are no array of \(\d+, \d+\)$'),
        (lambda raw: raw[:40], 'it is shorter than its header says$'),
        (lambda raw: raw[:5], 'it is shorter than its header says$'),
        (lambda raw: raw[:8] + b'[' + raw[9:], 'is no intact safetensors file'),
        (lambda raw: raw.replace(b'"dtype"', b'"dtypo"'), 'is no intact safetensors file'),
        (lambda raw: raw.replace(b'"BF16"', b'"FP8 "'), 'arrays of FP8  cannot be read, only of F64, F32, F16, BF16$'),
        (lambda raw: raw.replace(b'[3, 5]', b'[3, 6]'), r'are no array of \(3, 6\)$'),
        (lambda raw: b'', 'model.safetensors: '),
    ],
)
def test_a_damaged_file_is_refused_by_name(damage, message, tmp_path):
    path = tmp_path / 'model.safetensors'
    write(path, {'whole': arrays()['a.float32'], 'last': arrays()['a.bfloat16']})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        safetensors.read_model(tmp_path)


def test_weights_of_another_kind_are_refused(tmp_path):
    with pytest.raises(UserError, match=r'No such file or directory; weights are read from safetensors files alone$'):
        safetensors.read_model(tmp_path)
