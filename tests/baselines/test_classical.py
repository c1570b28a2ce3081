# SPDX-License-Identifier: Apache-2.0
"""InitialAlignment: takes the place of a network and moves nothing."""

from __future__ import annotations

import json

import pytest
import torch

from monai_deq.baselines import InitialAlignment
from monai_deq.inferers import FixedPointInferer
from monai_deq.utils import json_ready


def make_batch(ndim: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    moving, fixed = torch.rand((2, 3, 1, *(7, 6, 5)[:ndim]), generator=generator, dtype=torch.float64).to(dtype)
    return moving, fixed


@pytest.mark.parametrize("ndim", [2, 3])
def test_behind_the_inferer_of_the_networks(ndim: int) -> None:
    moving, fixed = make_batch(ndim)
    settings = {
        "solver": "anderson",
        "max_steps": 5,
        "tolerance": 0.1,
        "relative_tolerance": 0.1,
        "solver_options": {"a": 1},
    }
    network = InitialAlignment().eval()
    assert not list(network.parameters())
    out = FixedPointInferer(**settings)(moving, network, fixed)
    assert torch.equal(out["ddf"], torch.zeros(3, ndim, *moving.shape[2:]))
    torch.testing.assert_close(out["warped"], moving)
    assert out["steps"].tolist() == [0, 0, 0] and out["converged"].tolist() == [False] * 3
    assert out["reason"] == ["not iterated"] * 3
    assert out["residual"].shape == out["relative_residual"].shape == (3,)
    assert out["residual"].isnan().all() and out["relative_residual"].isnan().all()


def test_record_is_fit_for_json() -> None:
    _, record = InitialAlignment().solve(*make_batch(2))
    assert len(record) == 3 and record.residual.shape == (3, 1)
    assert json.loads(json.dumps(json_ready(record.item(1)), allow_nan=False)) == {
        "steps": 0,
        "residual": None,
        "relative_residual": None,
        "converged": False,
        "reason": "not iterated",
        "coarse_steps": [],
        "residual_trace": [],
        "relative_residual_trace": [],
    }


@pytest.mark.parametrize("ndim", [2, 3])
def test_given_displacement(ndim: int) -> None:
    moving, fixed = make_batch(ndim)
    shift = torch.zeros(3, ndim, *moving.shape[2:])
    shift[:, 1] = 1.0  # warped(x) = moving(x + 1) along the second axis, the last row repeated
    warped, ddf = InitialAlignment().eval()(moving, fixed, shift)
    assert torch.equal(ddf, shift)
    torch.testing.assert_close(warped, torch.cat([moving[:, :, :, 1:], moving[:, :, :, -1:]], dim=3))


@pytest.mark.parametrize(
    "dtype, expected",
    [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_type_of_the_field(dtype: torch.dtype, expected: torch.dtype) -> None:
    moving, fixed = make_batch(2, dtype)
    warped, ddf = InitialAlignment().eval()(moving, fixed)
    assert ddf.dtype == expected and warped.dtype == dtype


def test_bad_input() -> None:
    moving, fixed = make_batch(2)
    network = InitialAlignment()
    with pytest.raises(RuntimeError, match=r"InitialAlignment has nothing to train.*eval"):
        network(moving, fixed)
    network.eval()
    with pytest.raises(ValueError, match="same shape"):
        network(moving[:, :, :-1], fixed)
    with pytest.raises(ValueError, match="floating point"):
        network(moving.int(), fixed)
    with pytest.raises(ValueError, match=r"ddf must have shape \(3, 2, 7, 6\)"):
        network(moving, fixed, torch.zeros(3, 3, 7, 6))
