# SPDX-License-Identifier: Apache-2.0
"""Pairs that fail while others go on."""

from __future__ import annotations

import errno

__all__ = ["PairsFailedError", "check_on_error", "failure_reason", "is_disk_full", "root_error"]


class PairsFailedError(RuntimeError):
    """Some of the pairs failed, which has been said of each, and all else was done."""


def check_on_error(on_error: str) -> None:
    """Refuse (ValueError) what is neither ``"stop"`` nor ``"skip"``."""
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error: expected stop or skip, got {on_error!r}.")


def root_error(error: Exception) -> Exception:
    """What a transform raised, without MONAI's ``RuntimeError("applying transform ...")`` around it."""
    while str(error).startswith("applying transform") and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or somebody's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def failure_reason(error: Exception) -> str:
    """Why a pair failed, in one line. A full disk is raised again: the other pairs would meet it too."""
    error = root_error(error)
    if is_disk_full(error):
        raise error
    # str() of a KeyError is the repr of its text
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return f"{type(error).__name__}: {' '.join(str(text).split())}"
