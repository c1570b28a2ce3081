# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of a bundle's systems share: their cases, the times of their rows, and JSON without NaN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from monai_deq.evaluation.timing import Timing

__all__ = ["check_cases", "check_count", "plain_rows", "with_time"]


def check_cases(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """
    Check the cases of a benchmark.

    Args:
        cases: by title a dictionary with the name of an overlay under ``method`` and entries of a configuration.

    Returns:
        The cases as a new dictionary.

    Raises:
        ValueError: When there are none, or one is something else.
    """
    for title, case in cases.items():
        if not isinstance(case, Mapping) or not isinstance(case.get("method"), str):
            raise ValueError(f"cases: {title!r} must be a dictionary with the name of an overlay under 'method'.")
    if not cases:
        raise ValueError("cases must not be empty.")
    return dict(cases)


def check_count(value: int, name: str) -> None:
    """
    Check a whole number of at least 1.

    Args:
        value: the number.
        name: of the argument.

    Raises:
        ValueError: When it is another.
    """
    if int(value) != value or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}.")


def with_time(row: Any, timing: Timing, reference: Timing | None) -> Any:
    """
    A row with its time.

    Args:
        row: a data class with ``seconds``, ``time_ratio`` and ``failure``.
        timing: of its case.
        reference: the timing that times are given in terms of, ``None`` where it could not be measured.
    """
    if timing.failure is not None:
        return replace(row, failure=timing.failure)
    ratio = float("nan") if reference is None else timing.ratio_to(reference)
    return replace(row, seconds=timing.median, time_ratio=ratio)


def plain_rows(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """
    Rows as JSON has them, without NaN, which it does not know.

    Args:
        rows: data classes.
    """
    return [{k: None if v != v else v for k, v in asdict(row).items()} for row in rows]
