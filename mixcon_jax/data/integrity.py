"""The slow check of token stores: every byte is read and compared with the checksums of the metadata."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mixcon_jax.data.metadata import ARRAYS
from mixcon_jax.data.prepared import PreparedStore
from mixcon_jax.data.store import REMEDY, counts_of, hash_array, read_array, read_metadata, require_parts
from mixcon_jax.errors import UserError
from mixcon_jax.host.paths import expand


def verify(path: str) -> dict[str, int]:
    """Reads a whole store and compares it with its metadata: checksums, counts, and what the tokenizer says.

    Returns:
      How many 'documents' and 'tokens' it has.

    Raises:
      UserError: ``path`` is no store; or a part is missing, differs, or cannot be read.
    """
    metadata = read_metadata(path)
    require_parts(path, metadata)
    for name in ARRAYS:
        if hash_array(path, name) != metadata['sha256'][name]:
            raise UserError(f'{path}: damaged token store: {name} differs from its checksum; {REMEDY}')
    tokenizer = PreparedStore(path, path).load_tokenizer()
    counts = counts_of(*(read_array(path, name, metadata) for name in ('offsets', 'bytes', 'split')))
    found = {'counts': counts, 'eot_id': tokenizer.eot_id, 'vocab_size': tokenizer.vocab_size}
    for name, value in found.items():
        if metadata[name] != value:
            raise UserError(
                f'{path}: damaged token store: metadata.json has {name} {metadata[name]}, not {value}; {REMEDY}'
            )
    return {key: sum(count[key] for count in counts.values()) for key in ('documents', 'tokens')}


def verify_all(paths: Sequence[str], say: Callable[[str], None]) -> int:
    """``verify`` of each store, or of every store in a folder of stores, with a line each; returns how many are bad.

    Raises:
      UserError: a path is neither a store nor a folder that holds some.
    """
    bad = 0
    stores = [store for path in paths for store in stores_in(expand(path))]
    for path in stores:
        try:
            counts = verify(path)
            say(f'{path}: whole, {counts["documents"]:,} documents, {counts["tokens"]:,} tokens')
        except UserError as error:
            bad += 1
            say(str(error))
    return bad


def stores_in(path: str) -> list[str]:
    """The store at ``path``, or those in the folder, sorted."""
    if '://' not in path and not os.path.isdir(path):
        what = 'a file' if os.path.exists(path) else 'not there'
        raise UserError(f'{path or repr(path)} is {what}; name a token store, or a folder of some (data.cache_dir)')
    if '://' in path or os.path.exists(os.path.join(path, 'metadata.json')):
        return [path]
    found = sorted(str(folder) for folder in Path(path).iterdir() if (folder / 'metadata.json').exists())
    if not found:
        raise UserError(f'{path}: holds no token store; name one, or a folder of some (data.cache_dir)')
    return found
