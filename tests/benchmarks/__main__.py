"""Runs every benchmark in turn, each against its baseline: `make bench`, or `python -m tests.benchmarks NAME`.

Each module has `main()`, which prints its own figures and returns nothing; a failed expectation is an AssertionError.
"""

import importlib
import sys
import time
import traceback

from mixcon_jax.host.log_filters import shorten_jax

BENCHMARKS = (
    'selective_scan', 'conba_layer', 'mixers', 'train_step', 'decode', 'compile_time', 'context_parallel',
    'data_pipeline', 'checkpoint_stall', 'checkpoint_memory',
)  # fmt: skip


def main(names: list[str]) -> int:
    """Runs the named benchmarks, or all in their order; returns how many failed."""
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        print(f'error: no benchmark {unknown[0]!r}; choose from {", ".join(BENCHMARKS)}', file=sys.stderr)
        return 2
    shorten_jax()
    failed = []
    for name in names or BENCHMARKS:
        print(f'\n=== {name} ===', flush=True)
        start = time.perf_counter()
        try:
            importlib.import_module(f'tests.benchmarks.{name}').main()
        except Exception:  # the others still run
            traceback.print_exc()
            failed.append(name)
        print(f'({time.perf_counter() - start:.0f} s)', flush=True)
    if failed:
        print(f'\nerror: {len(failed)} of the benchmarks failed: {", ".join(failed)}', file=sys.stderr)
    return len(failed)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
