# SPDX-License-Identifier: Apache-2.0
"""Mean and standard deviation against Python's own."""

from __future__ import annotations

from statistics import mean, stdev

import pytest

from monai_deq.utils import mean_std

NAN, INF = float("nan"), float("inf")


def test_mean_std_leaves_out_what_is_no_score() -> None:
    values = [3.0, 4.5, 1.25, 9.0]
    assert mean_std([3.0, NAN, 4.5, INF, 1.25, 9.0]) == pytest.approx((mean(values), stdev(values), 4))
    assert mean_std([7.0, NAN]) == pytest.approx((7.0, NAN, 1), nan_ok=True)
    assert mean_std([NAN]) == pytest.approx((NAN, NAN, 0), nan_ok=True)
