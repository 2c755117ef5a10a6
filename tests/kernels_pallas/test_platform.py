"""A kernel knows the device it is traced for, here or absent."""

import types

import jax

from kernels_pallas import platform


def test_the_default_device_is_asked_before_the_devices_here():
    assert (platform.platform(), platform.compute_capability()) == (jax.devices()[0].platform, None)
    with jax.default_device('cpu'):
        assert (platform.platform(), platform.compute_capability()) == ('cpu', None)


def test_an_absent_gpu_is_what_its_compile_says(monkeypatch):
    gpu = types.SimpleNamespace(platform='cuda', compute_capability='9.0')
    monkeypatch.setattr(platform, 'device', lambda: gpu)
    assert (platform.platform(), platform.compute_capability()) == ('gpu', (9, 0))
