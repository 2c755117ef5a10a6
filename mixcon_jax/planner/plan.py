"""One plan: what it is asked, the process that compiles, and whether the answer fits. Loads no JAX."""

import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from mixcon_jax import config as configs
from mixcon_jax.errors import UserError
from mixcon_jax.planning import resources
from mixcon_jax.planning.hardware import TARGETS

TIMEOUT = 1800  # seconds of one compile
SHARE = 0.9  # of a device's memory, by default: the rest is the driver's, NCCL's, and what fragments
UNITS = {
    '': 1,
    'B': 1,
    'KIB': 2**10,
    'MIB': 2**20,
    'GIB': 2**30,
    'TIB': 2**40,
    'KB': 1e3,
    'MB': 1e6,
    'GB': 1e9,
    'TB': 1e12,
}


def plan(config: ml_collections.ConfigDict, job: dict[str, Any], products: Sequence[str], limit: int) -> dict[str, Any]:
    """One configuration on one mesh, as JSON has it.

    Args:
      config: validated for the devices.
      job: ``target``, ``hosts``, ``per_host``, ``what``, ``batch``, ``context``.
      products: what computes matrix products, 'triton', 'cublas' or both.
      limit: bytes that a device may hold.
    """
    job = job | {'context': job['context'] or config.data.seq_len, 'products': list(products)}
    start, before = time.perf_counter(), _cpu_seconds()
    found = compile_apart(job | {'config': json.loads(configs.to_json(config))})
    peak = max(found[name]['peak'] for name in products)
    target = TARGETS[job['target']]
    return {
        'name': config.name, **job, 'limit': limit, 'peak': peak, 'margin': limit - peak, 'fits': peak <= limit,
        'device': target.name, 'peak_flops': target.flops, 'remat': config.model.remat,
        'accum_steps': config.train.accum_steps, 'sum_gradients': config.train.sum_gradients,
        'batch_size': config.train.batch_size, 'seq_len': config.data.seq_len,
        'seconds': time.perf_counter() - start, 'cpu_seconds': _cpu_seconds() - before,
        **found,
    }  # fmt: skip


def _cpu_seconds() -> float:
    """Of all processes that have been started from here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compile_apart(job: dict[str, Any]) -> dict[str, Any]:
    """What `mixcon_jax.planner.compiled` says of a job, from a process of its own, which may abort.

    Raises:
      UserError: it ended otherwise than it should, with the end of what it said.
    """
    # No compiler reports on what a cache has.
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_COMPILATION_CACHE': 'false', resources.PTXAS: '1'}
    environment['PYTHONPATH'] = os.pathsep.join(filter(None, [str(_root()), environment.get('PYTHONPATH', '')]))
    arguments = [sys.executable, '-m', 'mixcon_jax.planner.compiled']
    try:
        done = subprocess.run(
            arguments,
            input=json.dumps(job | {'parent': os.getpid()}),
            capture_output=True,
            encoding='utf-8',
            errors='replace',
            env=environment,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f'not compiled in {TIMEOUT} s; try fewer layers or --products cublas') from error
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith('{'):
            found |= json.loads(line)
    if done.returncode or any(name not in found for name in job['products']):
        users = re.findall(r'(?:UserError|ConfigError): (.*)', done.stderr)
        if users:
            raise UserError(users[-1])
        end = ' | '.join(line.strip() for line in done.stderr.splitlines()[-5:] if line.strip())
        raise UserError(f'the compiler ended with code {done.returncode}: {end[-600:]}')
    found['resources'] = [vars(one) for one in resources.summary(found.pop('shared_bytes'), done.stderr)]
    found['rematerialisations'] = sorted(
        set(re.findall(r'Involuntary full rematerialization[^\n]{0,300}', done.stderr))
    )
    return found


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


def read_devices(text: str) -> tuple[str, int, int]:
    """``MODEL:HOSTSxDEVICES``, ``MODEL:DEVICES`` of one host, or ``MODEL``.

    Raises:
      UserError: an unknown model, or numbers that are none.
    """
    target, _, shape = text.partition(':')
    if target not in TARGETS:
        raise UserError(f'--devices {text}: unknown GPU {target!r}; known: {", ".join(TARGETS)}')
    found = re.fullmatch(r'(?:(\d{1,5})x)?(\d{1,5})', shape or '1')
    hosts, per_host = (int(found[1] or 1), int(found[2])) if found else (0, 0)
    if not hosts * per_host:
        raise UserError(f'--devices {text}: write {target}:HOSTSxDEVICES, each at least 1, such as {target}:16x8')
    return target, hosts, per_host


def read_limit(text: str, target: str) -> int:
    """Bytes of ``72GiB``, ``80GB``; without a text most of the device's memory.

    Raises:
      UserError: it is no size.
    """
    if not text:
        return int(SHARE * TARGETS[target].memory_bytes)
    found = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*', text)
    if not found or found[2].upper() not in UNITS or not float(found[1]):
        raise UserError(f'--memory-limit {text!r} is no size; write a number and a unit, such as 72GiB or 80GB')
    return int(float(found[1]) * UNITS[found[2].upper()])


def require_extra() -> None:
    """Raises: UserError: what compiles is not installed."""
    if importlib.util.find_spec('jax_plugins') is None or importlib.util.find_spec('jax_plugins.xla_cuda13') is None:
        raise UserError(
            '`mixcon plan` needs the extra "plan": make setup EXTRAS=plan, or pip install -r requirements-plan.lock'
        )
