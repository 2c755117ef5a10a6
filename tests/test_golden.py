"""The whole path, text to losses, against a committed curve; `python -m tests.golden.run` renews it."""

import json

import numpy as np

from tests.golden.run import LOSSES, losses


def test_losses_follow_the_committed_curve(tmp_path):
    """The tolerance covers other processors and library builds, which round and fuse differently."""
    golden = json.loads(LOSSES.read_text())
    got = losses(tmp_path)
    assert golden['train'][0] - golden['final'][0] > 1, 'the curve must fall, or it guards nothing'
    for kind, values in golden.items():
        assert len(got[kind]) == len(values)
        np.testing.assert_allclose(got[kind], values, rtol=2e-3, err_msg=kind)
