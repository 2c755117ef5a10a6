"""What is compiled here for GPUs that are not there has all our kernels, whether or not a GPU has verified them."""

import pytest

from kernels_pallas import cards


@pytest.fixture(scope='module', autouse=True)
def all_kernels():
    """Also in the processes that a module's fixtures start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cards.TRUST, '1')
        yield
