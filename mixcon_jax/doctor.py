"""What works on this machine, in a screen: devices, versions, extras, kernels, and a few steps of training."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from kernels_pallas import cards, platform, verify
from mixcon_jax import config as configs
from mixcon_jax.errors import UserError
from mixcon_jax.host.ambient import processors
from mixcon_jax.host.log_filters import DRIVERS
from mixcon_jax.host.paths import expand_path
from mixcon_jax.models.accounting import parameter_count
from mixcon_jax.parallel.mesh import make_mesh
from mixcon_jax.step import BATCH_KEYS, make_steps

STEPS, ROWS, LENGTH = 20, 4, 64
LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorstore', 'tokenizers')
EXTRAS = {  # extra: distribution that only it brings, what for
    'gpu': ('nvidia-cudnn-cu13', 'NVIDIA GPUs'),
    'plan': ('nvidia-cuda-nvdisasm', 'compiling for GPUs that are not there'),
    'huggingface': ('datasets', 'data sets of the Hugging Face hub'),
    'wandb': ('wandb', 'Weights & Biases'),
}
GIB = 2**30


def doctor(verify_now: bool = False, say: Callable[[str], None] = print) -> int:
    """Says what works here, trains for a moment, and offers to verify kernels that no GPU like this one has.

    Args:
      verify_now: verify without asking.
      say: gets every line.

    Returns:
      0, or 1 if JAX does not start, or training or the verification went wrong.

    Raises:
      UserError: nothing can be verified here.
    """
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # processes of its own want the GPU, too
    for part in (machine, libraries, devices):
        try:
            for line in part():
                say(line)
        except Exception as error:  # of any kind: what works is the question
            words = ' '.join(str(error).split())[:300] or 'JAX does not start'
            wish = os.environ.get('JAX_PLATFORMS')
            asked = f', with JAX_PLATFORMS={wish}' if wish and part is devices else ''
            say(f'{part.__name__:11}FAIL: {type(error).__name__}: {words}{asked}')
            return 1
    if verify_now and platform.platform() != 'gpu':
        raise UserError(f'nothing can be verified: JAX sees no NVIDIA GPU here, only {platform.platform()}')
    if verify_now and cards.local_folder() is None:
        raise UserError(f'this user has no home; `{cards.COMMAND} --out DIR` keeps what it finds in a folder')
    for line in kernels():
        say(line)
    if (code := train(say)) != 0:
        return code
    return offer(verify_now, say)


def machine() -> Iterator[str]:
    """Processor, memory and disks."""
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB
    yield f'machine    {processors()} cores, {memory:.0f} GiB of memory, Python {sys.version.split()[0]}'
    cache = configs.default().data.cache_dir
    try:
        folders = [Path.cwd(), expand_path(cache)]
    except UserError:
        yield f'           no home folder: set data.cache_dir, which is {cache}'
        folders = [Path.cwd()]
    for folder in folders:
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        writable = '' if os.access(there, os.W_OK) else ', which is not writable'
        yield f'           {shutil.disk_usage(there).free / GIB:.0f} GiB free for {folder}{writable}'


def libraries() -> Iterator[str]:
    """Versions, and which extras are installed."""
    yield f'libraries  {", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)}'
    for name, (distribution, use) in EXTRAS.items():
        state = 'installed' if _installed(distribution) else 'not installed'
        yield f'           extra {name + ":":13}{state} ({use})'


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def devices() -> Iterator[str]:
    """What JAX computes on."""
    found = jax.devices()
    yield f'devices    {len(found)} x {found[0].device_kind}'
    if platform.platform() == 'gpu':
        stats = found[0].memory_stats() or {}
        limit = f', {stats["bytes_limit"] / GIB:.0f} GiB for JAX' if 'bytes_limit' in stats else ''
        yield (
            f'           compute capability {found[0].compute_capability}, driver {verify.driver() or "unknown"}{limit}'
        )
    elif not any(map(os.path.exists, DRIVERS)):
        yield '           no NVIDIA driver is here: everything runs on the CPU'
    else:
        wish = os.environ.get('JAX_PLATFORMS')
        reason = f'JAX_PLATFORMS={wish}' if wish else 'the extra gpu brings what JAX needs for it'
        yield f'           there is an NVIDIA driver, but JAX does not use a GPU: {reason}'


def kernels() -> Iterator[str]:
    """Which GPU kernels run by default here, and why the others do not."""
    capability, head = platform.compute_capability(), 'kernels'
    if capability is None:
        yield f"{head:11}without a GPU, XLA's forms of them run; GPUs that have verified the kernels:"
        head = ''
        for kernel in cards.kernels():
            good = {card.device for card in cards.shipped(kernel) if card.counts}
            yield f'{head:11}{kernel:15} {", ".join(sorted(good)) or "none"}'
        return
    device = platform.device().device_kind
    for part, _ in verify.standing():
        reason = cards.uncovered(part.kernel, [part.variant], capability[0], device)
        standing = "verified, runs by default where a layer's call has it" if reason is None else f'not run: {reason}'
        if refused := verify.refusal(part):
            standing = f'not run: {refused}'
        elif reason is not None and cards.trusted():
            standing = f'runs, unverified, as {cards.TRUST} is set: {reason}'
        yield f'{head:11}{part.kernel:15} {part.variant:8} {standing}'
        head = ''


def train(say: Callable[[str], None]) -> int:
    """`training` in a process of its own, which a faulty driver or kernel may end."""
    command = [sys.executable, '-W', 'ignore', '-m', 'mixcon_jax.doctor']
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        say(line)
    if done.returncode:
        words = verify.last_words(done.stderr.splitlines()) or f'exit code {done.returncode}'
        say(f'training   FAILS: {words}')
    return 1 if done.returncode else 0


def training() -> Iterator[str]:
    """Twenty steps of a tiny MixCon on the first device.

    Raises:
      UserError: the loss is not finite, or does not fall.
    """
    config = configs.default()
    config.model.update(dim=64, vocab_size=256, pattern=('conba+moe', 'mamba+mlp', 'attention+mlp'))
    config.data.seq_len, config.train.batch_size, config.train.steps = LENGTH, ROWS, STEPS
    config.optim.warmup_steps = 2
    config = configs.validate(config)
    steps = make_steps(config, make_mesh(config.mesh, jax.devices()[:1]))
    tokens = np.random.default_rng(0).integers(0, 256, (ROWS, LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    values = tokens, np.roll(tokens, -1, 1), np.ones(tokens.shape, bool), np.ones_like(tokens), positions
    batch = steps.put(dict(zip(BATCH_KEYS, values, strict=True)))
    losses, start = [], time.perf_counter()
    state, metrics = steps.train_step(steps.init_state(), batch)
    losses.append(float(metrics['loss']))
    compiled = time.perf_counter()
    for _ in range(STEPS - 1):
        state, metrics = steps.train_step(state, batch)
        losses.append(float(metrics['loss']))
    ended = time.perf_counter()
    count = parameter_count(config.model).total
    yield f'training   {STEPS} steps of a MixCon with {count:,} parameters: loss {losses[0]:.3f} to {losses[-1]:.3f}'
    yield (
        f'           compiled in {compiled - start:.0f} s, then {1e3 * (ended - compiled) / (STEPS - 1):.0f} ms a step'
    )
    if not (np.isfinite(losses).all() and losses[-1] < losses[0]):
        raise UserError(f'losses that do not fall: {", ".join(f"{loss:.3f}" for loss in losses)}')


def offer(verify_now: bool, say: Callable[[str], None]) -> int:
    """Verifies what no GPU like this one has, if the user wants it."""
    capability = platform.compute_capability()
    if capability is None:
        return 0
    device = platform.device().device_kind
    missing = [
        part.kernel
        for part, _ in verify.standing()
        if cards.uncovered(part.kernel, [part.variant], capability[0], device) and not verify.refusal(part)
    ]
    names, folder = sorted(set(missing)), cards.local_folder()
    if not names or folder is None:
        return 0
    say(f'next       `{cards.COMMAND} {" ".join(names)}` verifies these kernels on this GPU, in a few minutes;')
    say('           what is right runs by default from then on')
    if not verify_now and not (sys.stdin.isatty() and _answer('           now? [y/N] ') in ('y', 'yes')):
        return 0
    return 0 if verify.verify(names, folder, verify.default_jobs(), times=False) else 1


def _answer(question: str) -> str:
    try:
        return input(question).strip().lower()
    except EOFError:
        return ''


if __name__ == '__main__':
    for line in training():
        print(line, flush=True)
