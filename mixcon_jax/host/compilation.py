"""Where compiled programs are kept from one start to the next."""

import jax
import ml_collections

from mixcon_jax.host.paths import expand_path


def keep_compiled(config: ml_collections.ConfigDict) -> None:
    """Keeps compiled programs in ``data.cache_dir``, unless the caller has chosen a place for them.

    A run goes on at once then. On GPUs this also keeps the choices that XLA made by timing: another choice could round
    otherwise.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update(
            'jax_compilation_cache_dir', str(expand_path(config.data.cache_dir, 'data.cache_dir') / 'xla')
        )
