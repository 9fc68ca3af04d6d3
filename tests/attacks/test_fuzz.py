"""Three hundred random small worlds: nothing is called exact that is not, crashes, or is
refused without need.

The generator and ten thousand more are in studies/fuzz. A failure names its seed, and
`python -m studies.fuzz --show SEED` prints what that world is and what becomes of it.
"""

from __future__ import annotations

import pytest

from studies.fuzz.measure import attacked, faults

pytestmark = pytest.mark.slow  # all of them together, not one


@pytest.mark.parametrize("seed", range(0, 300, 3))  # `python -m studies.fuzz` has them all
def test_a_random_world_is_told_the_truth(seed: int) -> None:
    found = faults(attacked((seed,)))
    assert not found, f"seed {seed}: {'; '.join(found)}. To see it: python -m studies.fuzz --show {seed}"
