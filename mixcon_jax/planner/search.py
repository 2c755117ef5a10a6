"""`mixcon plan --search`: several meshes, recomputations and microbatches, and which of them no other beats."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections

from mixcon_jax import config as configs
from mixcon_jax.errors import ConfigError, UserError
from mixcon_jax.parallel.axes import AXES, BATCH_AXES
from mixcon_jax.planner.plan import plan

REMAT = ('none', 'selective', 'block')
Candidate = tuple[ml_collections.ConfigDict, str]  # validated, and what sets it apart, in words


def search(
    config: ml_collections.ConfigDict,
    job: dict[str, Any],
    products: Sequence[str],
    limit: int,
    most: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Plans the first ``most`` candidates one after the other.

    Args:
      config: of the experiment, not validated.
      job: as of `plan.plan`.
      products: the same.
      limit: the same.
      most: plans to make; each compiles the step anew.
      say: shows a line of progress.

    Returns:
      ``plans``: all that compiled, those that fit first, the fastest of them first, each with ``sets``, what sets it
      apart, and whether it is ``best``: it fits, and none that fits is estimated to be as fast with as little memory.
      ``left``: candidates that were not planned.

    Raises:
      UserError: no mesh of so many devices goes with the configuration, or no candidate could be planned.
    """
    found = list(candidates(config, job['hosts'], job['per_host'], job['what']))
    if not found:
        raise UserError(f'no mesh of {job["hosts"] * job["per_host"]} devices goes with {config.name or "this file"}')
    plans: list[dict[str, Any]] = []
    failed: UserError | None = None
    for number, (each, what) in enumerate(found[:most], 1):
        try:
            one = plan(each, job, products, limit)
        except UserError as error:
            say(f'{number} of {min(most, len(found))}: {what}: {error}')
            failed = error
            continue
        seconds = max(one[name]['estimate']['hidden'] for name in products)
        plans.append({'sets': what, 'seconds_a_step': seconds, **one})
        say(f'{number} of {min(most, len(found))}: {what}: planned in {one["seconds"]:.0f} s')
    if not plans:
        raise UserError(f'none of {min(most, len(found))} candidates could be planned; the last: {failed}')
    plans.sort(key=lambda one: (one['peak'] > limit, one['seconds_a_step']))
    for one in plans:
        one['best'] = one['fits'] and not any(_beats(other, one) for other in plans if other['fits'])
    return {'plans': plans, 'left': len(found[most:]), 'fits': any(one['fits'] for one in plans), 'limit': limit}


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    mine, theirs = ((each['peak'], each['seconds_a_step']) for each in (one, other))
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def candidates(
    config: ml_collections.ConfigDict, hosts: int, per_host: int, what: str = 'train'
) -> Iterator[Candidate]:
    """All that the configuration allows on so many devices, those first that exchange least across hosts.

    Of meshes: every product of the axes whose last axes, ``expert``, ``context`` and ``tensor``, stay inside a host. Of
    microbatches: as few as there can be, and so many that a device has one row; between them by factors of four.
    Generation has neither microbatches nor recomputations.
    """
    devices = hosts * per_host
    meshes = [
        dict(zip(AXES, sizes, strict=True))
        for sizes in itertools.product(_divisors(devices), repeat=len(AXES))
        if math.prod(sizes) == devices and per_host % math.prod(sizes[2:]) == 0
    ]
    # Parameters shared out first; then what is simplest.
    meshes.sort(key=lambda mesh: (mesh['data'], mesh['tensor'] * mesh['context'], mesh['expert']))
    for mesh, remat in itertools.product(meshes, REMAT if what == 'train' else (config.model.remat,)):
        rows = config.train.batch_size // math.prod(mesh[axis] for axis in BATCH_AXES)
        accums = {rows // part for part in (1, 4, 16, 64) if part <= rows} | {1}
        for accum in sorted(accums, reverse=True) if what == 'train' else (1,):
            trial = config.copy_and_resolve_references()
            trial.mesh.update(mesh)
            trial.model.remat, trial.train.accum_steps = remat, accum
            try:
                valid = configs.validate(trial, devices)
            except ConfigError:
                continue
            axes = ' '.join(f'mesh.{axis}={size}' for axis, size in mesh.items() if size > 1 or axis == 'data')
            yield valid, f'{axes} model.remat={remat} train.accum_steps={accum}' if what == 'train' else axes


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
