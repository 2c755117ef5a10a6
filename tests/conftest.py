"""What holds for every test: the CPU with eight devices, cached compilations, and checked shapes and types.

Environment variables are set before JAX is imported and are inherited by the processes that tests start.
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]

os.environ['JAX_PLATFORMS'] = 'cpu'
if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'.strip()
# Compiling is most of the tests' time, and LLVM's optimizations half of that; `make test-all` runs with them.
if 'xla_backend_optimization_level' not in os.environ['XLA_FLAGS']:
    os.environ['XLA_FLAGS'] += ' --xla_backend_optimization_level=0'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.cache' / 'jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
# A process that a test starts spends four seconds on compiling the modules that it imports, or one on reading what was
# kept: it is kept, even where the environment says not to.
sys.dont_write_bytecode, sys.pycache_prefix = False, str(ROOT / '.cache' / 'pycache')
os.environ |= {'PYTHONDONTWRITEBYTECODE': '', 'PYTHONPYCACHEPREFIX': sys.pycache_prefix}

import jaxtyping  # after the environment

import tests.typechecking  # noqa: F401  the hook below finds it by name

# Annotations of our own packages are checked at run time: the only place where that is switched on. It costs time only
# while functions are traced. MIXCON_TYPECHECK=0 leaves it out, to see an error without its frames.
if os.environ.get('MIXCON_TYPECHECK', '1') != '0':
    jaxtyping.install_import_hook(['mixcon_jax', 'kernels_pallas'], 'tests.typechecking.checked')
