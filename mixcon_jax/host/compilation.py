"""What must be set before JAX starts its devices: their number, and where compiled programs are kept."""

import contextlib

import jax
import ml_collections

from mixcon_jax.host.paths import expand_path


def make_cpu_devices(number: int) -> None:
    """Has JAX make so many devices of a CPU, unless the caller has started them; 0 leaves its default."""
    if number:
        with contextlib.suppress(RuntimeError):  # they are started: who counts them sees to it
            jax.config.update('jax_num_cpu_devices', number)


def keep_compiled(config: ml_collections.ConfigDict) -> None:
    """Keeps compiled programs in ``data.cache_dir``, unless the caller has chosen a place for them.

    A run goes on at once then. On GPUs this also keeps the choices that XLA made by timing: another choice could round
    otherwise.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update(
            'jax_compilation_cache_dir', str(expand_path(config.data.cache_dir, 'data.cache_dir') / 'xla')
        )
