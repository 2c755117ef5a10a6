"""``mixcon plan``: reads what it is asked, prints what a plan, or the best of several, says. Loads no JAX."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mixcon_jax import config as configs
from mixcon_jax.errors import Exit, UserError
from mixcon_jax.host.files import file_to_write, write_whole
from mixcon_jax.planner import words
from mixcon_jax.planner.plan import plan, read_devices, read_limit, require_extra
from mixcon_jax.planner.search import search

DOES_NOT_FIT = 3
PICTURES = ('.svg', '.png')


def command(
    config: str,
    overrides: Sequence[str],
    wanted: str,
    *,
    memory_limit: str = '',
    what: str = 'train',
    batch: int = 1,
    context: int = 0,
    products: Sequence[str] = ('triton', 'cublas'),
    json_file: str = '',
    most: int = 0,
    picture: str = '',
) -> int:
    """The command line's ``plan``: prints, and writes JSON and a picture.

    Args:
      config: experiment file, ``FILE`` or ``FILE:ARG``.
      overrides: ``key=value``.
      wanted: ``MODEL:HOSTSxDEVICES``.
      memory_limit: such as ``72GiB``; '' for most of the device's memory.
      what: 'train', 'prefill' or 'decode'.
      batch: of prefill and decode, sequences.
      context: of them, tokens; 0 for ``data.seq_len``.
      products: what computes matrix products.
      json_file: where everything goes as well; '' for nowhere.
      most: plans to search through for the best; 0 plans what the configuration says.
      picture: file of the search's picture, ``.svg`` or ``.png``; '' for none.

    Returns:
      0 if what is planned, or one of many, fits into the memory limit, 3 if it does not.

    Raises:
      UserError: names the argument or key, or says how the compiler ended.
    """
    target, hosts, per_host = read_devices(wanted)
    limit = read_limit(memory_limit, target)
    if picture and (not most or Path(picture).suffix not in PICTURES):
        raise UserError(f'--picture {picture} is of a --search, and its name ends in {" or ".join(PICTURES)}')
    require_extra()
    loaded = configs.load(config, overrides)
    answer = file_to_write('--json', json_file) if json_file else None
    drawing = file_to_write('--picture', picture) if picture else None
    job = {'target': target, 'hosts': hosts, 'per_host': per_host, 'what': what, 'batch': batch, 'context': context}
    if most:
        found = search(loaded, job, products, limit, most, lambda line: print(line, file=sys.stderr, flush=True))
        lines = words.table(found)
    else:
        found = plan(configs.validate(loaded, hosts * per_host), job, products, limit)
        lines = words.lines(found)
    for line in lines:
        print(line)
    if answer:
        write_whole(answer, (json.dumps(found, indent=1) + '\n').encode())
    if drawing:
        from mixcon_jax.planner.picture import draw

        write_whole(drawing, draw(found, Path(picture).suffix[1:]))
    return Exit.DONE if found['fits'] else DOES_NOT_FIT
