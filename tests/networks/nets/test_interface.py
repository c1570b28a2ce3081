# SPDX-License-Identifier: Apache-2.0
"""What is asked of every registration method: the call with one and with two tensors, and the pairs it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.networks.blocks import Warp
from nets import Pull, deq_net, pair, tiny_recurrent_update, tiny_update

from monai_deq.networks.nets import IteratedNet, RegistrationNet, UnrolledRegistrationNet
from monai_deq.networks.nets.interface import check_pair
from monai_deq.solvers import SolverRecord, SolverSettings


class Constant(RegistrationNet):
    """A classical method: displaces by a voxel for each step of its settings; nothing to train."""

    def solve(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None, **changes: Any
    ) -> tuple[torch.Tensor, SolverRecord]:
        steps = self.solver.changed(**changes).max_steps
        ddf = torch.full((len(fixed), fixed.ndim - 2, *fixed.shape[2:]), float(steps))
        n = torch.full((len(fixed),), steps)
        return ddf, SolverRecord(n, ddf[:, 0, 0, :1], ddf[:, 0, 0, :1], n > 0, ("step limit",) * len(fixed))


def networks(ndim: int) -> list[RegistrationNet]:
    return [
        deq_net(tiny_update(ndim), max_steps=3, num_states=1),
        deq_net(tiny_recurrent_update(ndim), max_steps=3, num_states=0),
        UnrolledRegistrationNet(tiny_update(ndim), steps=(1, 2)),
    ]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(9, 12), (4, 6, 5)])
def test_pair_in_displacement_out(size: tuple[int, ...], training: bool) -> None:
    both = torch.cat(pair(size), dim=1)
    start = 0.5 * torch.ones(2, len(size), *size)
    for network in networks(len(size)):
        network.train(training)
        with torch.no_grad():
            expected = network(both[:, :1], both[:, 1:])[1]
            assert expected.abs().max() > 1e-3
            assert torch.equal(network(both), expected)
            # the order is moving, fixed
            assert not torch.allclose(network(both.flip(1)), expected)
            started = network(both[:, :1], both[:, 1:], start)[1]
            assert torch.equal(network(both, initial_ddf=start), started) and not torch.equal(started, expected)


def test_settings_of_one_call_with_one_tensor() -> None:
    both = torch.cat(pair((5, 4)), dim=1)
    network = deq_net(Pull(), tolerance=0.0).eval()
    expected = (1 - 0.5**3) * (both[:, 1:] - both[:, :1]).expand(-1, 2, -1, -1)
    torch.testing.assert_close(network(both, max_steps=3), expected)


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 4, 5), (2, 4, 5), (1, 2, 4)])
def test_one_tensor_of_another_shape(shape: tuple[int, ...]) -> None:
    words = str(shape).replace("(", r"\(").replace(")", r"\)")
    for network in (*networks(2), Constant()):
        with pytest.raises(ValueError, match=rf"a pair must have the shape \(B, 2, H, W\[, D\]\), .*got {words}"):
            network(torch.zeros(shape))


def test_without_coarser_networks_a_start_is_its_own() -> None:
    moving, fixed = pair((5, 4))
    start = torch.zeros(2, 2, 5, 4)
    for network in networks(2):
        assert isinstance(network, IteratedNet) and network.coarse is None
        assert network.coarse_start(moving, fixed) == (None, ())
        assert network.coarse_start(moving, fixed, start) == (start, ())


def test_a_method_without_training() -> None:
    moving, fixed = pair((5, 4))
    method = Constant().eval()
    assert method.solver == SolverSettings()
    warped, ddf = method(moving, fixed, max_steps=2)
    assert not isinstance(method, IteratedNet) and bool((ddf == 2).all())
    torch.testing.assert_close(warped, Warp()(moving, ddf))
    with pytest.raises(NotImplementedError, match="Constant has nothing to train"):
        method.train()(moving, fixed)
    for kind in (RegistrationNet, IteratedNet):
        with pytest.raises(TypeError, match="abstract"):
            kind()  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("moving", "fixed", "words"),
    [
        ((1, 1, 4, 5), (1, 1, 5, 4), r"\(1, 1, 4, 5\) and \(1, 1, 5, 4\)"),
        ((1, 2, 4, 5), (1, 2, 4, 5), r"\(B, 1, H, W\[, D\]\)"),
        ((1, 1, 4), (1, 1, 4), r"\(1, 1, 4\)"),
    ],
)
def test_pairs_that_do_not_fit(moving: tuple[int, ...], fixed: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_pair(torch.zeros(moving), torch.zeros(fixed))


def test_whole_numbers() -> None:
    image = torch.zeros(1, 1, 4, 5)
    with pytest.raises(ValueError, match=r"floating point .*torch.uint8 and torch.float32"):
        check_pair(image.byte(), image)
    with pytest.raises(ValueError, match=r"floating point .*torch.float32 and torch.int64"):
        check_pair(image, image.long())
