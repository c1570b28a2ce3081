# SPDX-License-Identifier: Apache-2.0
"""Flags as a command line gives them."""

from __future__ import annotations

from typing import Any

import pytest

from monai_deq.utils import as_flag


@pytest.mark.parametrize(
    ("value", "flag"),
    [(True, True), (False, False), ("true", True), ("false", False), ("True", True), ("FALSE", False)],
)
def test_flags(value: Any, flag: bool) -> None:
    assert as_flag(value, "resume") is flag


@pytest.mark.parametrize("value", ["yes", "", "0", 0, 1, None, [], 1.0])
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="resume must be true or false, got"):
        as_flag(value, "resume")
