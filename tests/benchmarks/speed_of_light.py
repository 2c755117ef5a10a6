"""How fast a whole train step of the ladder could be on one GPU, by three floors; nothing runs, nothing is compiled.

    python -m tests.benchmarks.speed_of_light              # the ladder's models on an H200
    python -m tests.benchmarks.speed_of_light --device h100

The floors, in milliseconds a step:

- products: operations by models/accounting, which MFU counts, over the peak of dense bfloat16;
- bytes: what a step must move (`compiled_step`: parameters, gradients and moments once each, what the backward pass
  keeps twice) over the memory's bandwidth;
- exponentials, as layers count theirs and a softmax over the vocabulary in either pass, over the rate at which an H200
  was seen to compute them.

A step takes at least the largest of them, and at most their sum if each were at its floor and none overlapped.
"""

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

# FLOP/s of dense bfloat16 and bytes/s by the data sheets; an H100 has the cores of an H200.
DEVICES = {'h100': (989e12, 3.352e12), 'h200': (989e12, 4.8e12)}
EXPONENTIALS = 3.22e12  # a second: the floor of `python -m kernels_pallas.verify`, measured beside the scan's card


def floors(config: Any, device: str) -> dict[str, float]:
    """Milliseconds a step at least, by each floor, and the step's tokens."""
    from mixcon_jax.models.accounting import exponentials_per_token, flops_per_token, parameter_count
    from mixcon_jax.planning.compiling import devices
    from tests.benchmarks.compiled_step import kept_bytes

    flops, bandwidth = DEVICES[device]
    tokens = config.train.batch_size * config.data.seq_len
    moved = 32 * parameter_count(config.model).total
    microbatches = config.train.accum_steps
    moved += 2 * microbatches * kept_bytes(config, config.train.batch_size // microbatches, devices('h100')[0])
    return {
        'products': 1e3 * flops_per_token(config.model, config.data.seq_len) * tokens / flops,
        'bytes': 1e3 * moved / bandwidth,
        'exponentials': 1e3 * sum(exponentials_per_token(config.model, config.data.seq_len)) * tokens / EXPONENTIALS,
        'tokens': tokens,
    }


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('rungs', nargs='*', metavar='RUNG', help='of the ladder; by default those of compiled_step')
    parser.add_argument('--device', choices=DEVICES, default='h200')
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args(arguments)
    os.environ['MIXCON_TRUST_UNVERIFIED'] = '1'
    from tests.benchmarks.compiled_step import MODELS, configuration

    if not args.json:
        print(f'{args.device}, ms a step at least\n{"rung":28}{"products":>10}{"bytes":>10}{"exponentials":>14}'
              f'{"largest":>10}{"tokens/s at most":>18}{"sum":>8}')  # fmt: skip
    for name in args.rungs or MODELS:
        found = floors(configuration(name), args.device)
        three = [found[key] for key in ('products', 'bytes', 'exponentials')]
        if args.json:
            print(json.dumps({name: found}), flush=True)
            continue
        columns = ''.join(f'{value:{width}.1f}' for value, width in zip(three, (10, 10, 14)))
        most = f'{1e3 * found["tokens"] / max(three):,.0f}'
        print(f'{name:28}{columns}{max(three):10.1f}{most:>18}{sum(three):8.1f}', flush=True)


if __name__ == '__main__':
    import sys

    main(sys.argv[1:])
