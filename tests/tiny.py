"""A run that takes seconds: a whole MixCon of width 32 on a corpus that is made here."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import ml_collections
import numpy as np

from mixcon_jax import config as configs
from mixcon_jax.runs.records import Record, last, read

ROOT = Path(__file__).resolve().parents[1]
TIMELESS = ('time', 'goodput', 'time_shares', 'tokens_per_second', 'flops_per_second', 'mfu')  # of a record
WORDS = ('the', 'state', 'of', 'a', 'loop', 'gains', 'delay', 'and', 'noise', 'while', 'experts', 'route', 'tokens')


def write_corpus(folder: Path, documents: int = 40, seed: int = 0) -> str:
    """Writes documents of unequal length, one a file; returns a glob for them."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        words = rng.choice(WORDS, size=int(rng.integers(5, 120)))
        (folder / f'{number:03d}.txt').write_text(' '.join(words) + f' {number}.\n')
    return f'files:{folder}/*.txt'


def tiny_config(folder: Path, **overrides) -> ml_collections.ConfigDict:
    """One block of conba+moe and attention+mlp, 12 steps of 8 x 32 tokens; files lie in ``folder``.

    Args:
      folder: where corpus and caches go.
      overrides: dotted keys with underscores doubled: ``train__steps=4``.
    """
    config = configs.default()
    config.model.dim = 32
    config.model.vocab_size = 320
    config.model.pattern = ('conba+moe', 'attention+mlp')
    config.model.attention.num_heads = 2
    config.model.attention.num_kv_heads = 1
    config.model.ssm.d_state = 4
    config.model.conba.head_dim = 16
    config.model.moe.num_experts = 2
    config.model.moe.top_k = 1
    corpus = folder / 'corpus'
    config.data.sources = (f'files:{corpus}/*.txt' if corpus.exists() else write_corpus(corpus),)
    config.data.cache_dir = str(folder / 'cache')
    config.data.tokenizer_vocab_size = 300
    config.data.heldout_fraction = 0.2
    config.data.seq_len = 32
    config.optim.warmup_steps = 2
    config.train.steps = 12
    config.train.batch_size = 8
    config.eval.every = 4
    config.checkpoint.every = 4
    config.log.every = 1
    config.log.tensorboard = False
    for key, value in overrides.items():
        configs.put(config, key.replace('__', '.'), value)
    return config


def write_experiment(path: Path, config: ml_collections.ConfigDict) -> Path:
    """Writes an experiment file with this configuration, for other processes."""
    text = configs.to_json(config)
    path.write_text(f'from mixcon_jax.config import from_json\n\ndef get_config():\n    return from_json({text!r})\n')
    return path


def start_training(
    config: ml_collections.ConfigDict, workdir: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """Starts ``mixcon train`` as a process of its own on one CPU device; both streams come as one text pipe."""
    experiment = write_experiment(workdir.parent / f'{workdir.name}.experiment.py', config)
    command = [sys.executable, '-m', 'mixcon_jax.cli', 'train', f'--config={experiment}', f'--workdir={workdir}']
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    # One device, compiled as the tests are: most of a short run is compiling, and the rest importing.
    flags = ' '.join(flag for flag in os.environ.get('XLA_FLAGS', '').split() if 'device_count' not in flag)
    settings = os.environ | {'PYTHONPATH': path, 'XLA_FLAGS': flags, 'PYTHONUNBUFFERED': '1'}
    settings |= environment or {}
    return subprocess.Popen(
        command, cwd=workdir.parent, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def outcome(workdir: Path) -> list[Record]:
    """Everything a run's metrics say that is no time: each record once, in order, and the parameters' hash."""
    records = read(workdir / 'metrics.jsonl')
    kept = [r for r in records if r['kind'] in ('train', 'eval', 'final')]
    done = last(records, kind='run')
    assert done is not None and done['event'] == 'done'
    kept = [{key: value for key, value in r.items() if key not in TIMELESS} for r in kept]
    return [*kept, {'fingerprint': done['fingerprint']}]
