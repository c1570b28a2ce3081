# SPDX-License-Identifier: Apache-2.0
"""Weights of the intermediate states of an unrolled iteration."""

from __future__ import annotations

__all__ = ["exponential_state_weights"]


def exponential_state_weights(num_states: int, base: float = 10.0) -> list[float]:
    """
    Exponentially increasing weights of the states before the last one, ``w_t = base ** ((t - 1) / (T - 1))`` for
    ``t = 1 ... T - 1`` with ``T = num_states + 1`` (paper, Eq. 4 with the weights of RIIR), divided by that of the
    final state, which is one in :py:class:`StatesLoss`.

    Args:
        num_states: number of states before the last one, ``T - 1``.
        base: weight of the last state in terms of the first. Defaults to 10.

    Returns:
        The weights, from ``1 / base`` up.

    Raises:
        ValueError: When an argument is out of its range.
    """
    if num_states < 0:
        raise ValueError(f"num_states must not be negative, got {num_states}.")
    if not base > 0:
        raise ValueError(f"base must be above zero, got {base}.")
    return [base ** (t / num_states - 1) for t in range(num_states)]
