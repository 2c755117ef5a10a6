"""What the processes of a run tell one another before they rely on it; of one process it is what it says itself.

Every process must make the same calls in the same order.
"""

import itertools
import json
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

MOST = 512  # bytes of what ``of_each`` passes on


def of_first(value: Any) -> Any:
    """A value of JSON, as the first process has it."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    sent = np.resize(text, size)  # only what the first one sends counts
    return json.loads(multihost_utils.broadcast_one_to_all(sent).tobytes())


def of_each(text: str) -> list[str]:
    """The texts of all processes, in their order, each cut to 512 bytes."""
    if jax.process_count() == 1:
        return [text]
    sent = np.zeros(MOST, np.uint8)
    own = np.frombuffer(text.encode()[:MOST], np.uint8)
    sent[: own.size] = own
    return [row.tobytes().rstrip(b'\0').decode(errors='ignore') for row in multihost_utils.process_allgather(sent)]


def told_to_stop(asked: int) -> bool:
    """Whether all are to stop here because one got SIGTERM.

    Args:
      asked: how often this process has asked, this time included. All are told to stop at the same count.
    """
    try:
        return multihost_utils.reached_preemption_sync_point(asked)
    except RuntimeError:  # JAX_ENABLE_PREEMPTION_SERVICE=false
        return False


def meet(seconds: float) -> None:
    """Returns when all have come here. Devices do not wait, so that they may be otherwise busy for as long.

    JAX has all meet as they exit, too, but ends those that have waited for five minutes by an abort.
    """
    if jax.process_count() > 1:
        client: Any = distributed.global_state.client
        client.wait_at_barrier(f'mixcon {next(_meetings)}', int(1000 * seconds))


_meetings = itertools.count()
