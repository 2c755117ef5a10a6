"""A hash of parameters that tells whether two runs ended bit for bit alike."""

import hashlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixcon_jax.trees import Tree, named_leaves


def fingerprint(params: Tree) -> str:
    """SHA-256, in hex, over names, types, shapes and bytes of all leaves in order of their names.

    It does not depend on how the arrays lie on devices or processes; every process must call it, as arrays that are
    spread over processes are gathered, one at a time.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(params).items()):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        value = np.asarray(leaf)
        value = value.astype(value.dtype.newbyteorder('<'), copy=False)
        digest.update(f'{name} {value.dtype.name} {value.shape}\n'.encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()
