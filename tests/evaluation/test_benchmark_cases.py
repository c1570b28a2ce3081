# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share; their arguments are checked in their own tests."""

from __future__ import annotations

import json

from monai_deq.evaluation import SpeedRow, Timing
from monai_deq.evaluation.benchmark_cases import plain_rows, with_time


def test_times_and_rows() -> None:
    row, slow, quick = SpeedRow("a", dice=0.5), Timing(seconds=(4.0, 2.0, 3.0)), Timing(seconds=(1.0, 2.0, 1.5))
    timed = with_time(row, slow, quick)
    # medians 3 and 1.5; what was there before stays
    assert (timed.seconds, timed.dice, timed.failure) == (3.0, 0.5, None) and timed.time_ratio == slow.ratio_to(quick)
    assert with_time(row, slow, None).seconds == 3.0
    (plain,) = plain_rows([with_time(row, slow, None)])
    assert plain["time_ratio"] is None and plain["dice"] == 0.5
    json.dumps(plain, allow_nan=False)
