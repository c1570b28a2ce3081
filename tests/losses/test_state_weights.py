# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from monai_deq.losses import exponential_state_weights


def test_weights_of_riir() -> None:
    # w_t = 10 ** ((t - 1) / 5) for t = 1 ... 6, over w_6 = 10
    expected = [0.1, 0.1584893192461114, 0.25118864315095796, 0.3981071705534972, 0.6309573444801932]
    assert exponential_state_weights(5) == pytest.approx(expected, rel=1e-12)
    assert exponential_state_weights(2, base=4.0) == pytest.approx([0.25, 0.5])
    assert exponential_state_weights(0) == []


@pytest.mark.parametrize("arguments", [(-1,), (3, 0.0), (3, float("nan"))])
def test_bad_arguments(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must"):
        exponential_state_weights(*arguments)  # type: ignore[arg-type]
