# SPDX-License-Identifier: Apache-2.0
"""Settings that do nothing are refused."""

from __future__ import annotations

import pytest

from monai_deq.utils import refuse_unused


def test_settings_that_are_right() -> None:
    refuse_unused("RIIR", {})
    refuse_unused("RIIR", {"a": (0, 0), "b": ("false", False), "c": (None, None), "d": ("phantom", "phantom")})


def test_others_are_named() -> None:
    with pytest.raises(ValueError, match="RIIR has no use for b 'true', c 2: leave it out"):
        refuse_unused("RIIR", {"a": (0, 0), "b": ("true", False), "c": (2, 0)})
