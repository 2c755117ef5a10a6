"""Memory of a layer of every mixer, forward and backward, is linear in the tokens of a row, as compiled for an H100.

Nothing runs. What a doubling of the row adds may be little beside what no length changes, so that is judged as
well: 4 times as much would be quadratic.
"""

import pytest

from mixcon_jax.models import kinds
from tests.benchmarks.mixer_memory import LENGTHS, growth
from tests.benchmarks.scan_memory import MIB, peaks


@pytest.mark.slow
@pytest.mark.parametrize('mixer', kinds.names('mixer'))
def test_memory_is_linear(mixer):
    sizes = peaks(mixer, 'default', LENGTHS, dim=512)
    assert len(sizes) == len(LENGTHS)
    print(f'{mixer}: {[round(size / MIB, 1) for size in sizes]} MiB')
    assert max(growth(sizes)) <= 2.1
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    assert 0 < second <= 2.5 * first, f'twice as many tokens add {second / first:.2f} times as much'
