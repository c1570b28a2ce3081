# SPDX-License-Identifier: Apache-2.0
"""What is asked of every registration method: the call with one and with two tensors, pairs it refuses, pickles."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.losses import GlobalMutualInformationLoss, LocalNormalizedCrossCorrelationLoss
from monai.networks.blocks import Warp
from nets import Pull, deq_net, pair, tiny_recurrent_update, tiny_update
from torch.utils.data import ConcatDataset

from monai_deq.baselines import InitialAlignment
from monai_deq.networks.nets import (
    DEQRegistrationNet,
    EnergyRegistrationNet,
    GradientSettings,
    IteratedNet,
    RegistrationNet,
    RestSettings,
    UnrolledRegistrationNet,
    coarse_to_fine,
    gradirn_net,
    riir_net,
    unrolling_net,
    voxelmorph_net,
)
from monai_deq.networks.nets.interface import check_pair
from monai_deq.solvers import SolverRecord, SolverSettings
from monai_deq.transforms import FixedPointSolverd


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


#: tiny ones of every kind, with weights that are seen
PICKLED: dict[str, Callable[[int], RegistrationNet]] = {
    "DEQReg": lambda ndim: deq_net(tiny_update(ndim), max_steps=3, num_states=1),
    "DEQReg, implicit": lambda ndim: deq_net(tiny_update(ndim), max_steps=3, num_states=0, gradient="implicit"),
    "DEQReg at rest": lambda ndim: DEQRegistrationNet(
        tiny_update(ndim, checkpoint_parts=2),
        solver=SolverSettings("anderson", 4, options={"window": 2}),
        gradient=GradientSettings(num_states=1, checkpointed=True),
        rest=RestSettings(),
    ),
    "coarse to fine": lambda ndim: coarse_to_fine(deq_net(tiny_update(ndim), max_steps=3, num_states=0), 2, 3),
    "hidden state": lambda ndim: deq_net(tiny_recurrent_update(ndim), max_steps=3, num_states=0),
    "unrolled": lambda ndim: UnrolledRegistrationNet(tiny_update(ndim), steps=(1, 2), all_states=True),
    "VoxelMorph": lambda ndim: voxelmorph_net(ndim, 2),
    "Unrolling": lambda ndim: unrolling_net(ndim, 2, 2),
    "GraDIRN": lambda ndim: gradirn_net(ndim, 2, 2, LocalNormalizedCrossCorrelationLoss(ndim, 3)),
    "RIIR": lambda ndim: riir_net(ndim, 2, GlobalMutualInformationLoss(num_bins=5)),
    "energy": lambda ndim: EnergyRegistrationNet(spatial_dims=ndim, steps=(2, 3)),
    "initial alignment": lambda ndim: InitialAlignment(),
    "a method outside": lambda ndim: Constant(),
}
ROUND_TRIPS: dict[str, Callable[[RegistrationNet], RegistrationNet]] = {
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
    "deepcopy": copy.deepcopy,
    "torch.save": lambda network: torch.load(saved(network), weights_only=False),
}


def saved(network: torch.nn.Module) -> io.BytesIO:
    torch.save(network, file := io.BytesIO())
    file.seek(0)
    return file


def pickled_network(kind: str, ndim: int) -> RegistrationNet:
    network = PICKLED[kind](ndim)
    torch.manual_seed(3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return network


@pytest.mark.parametrize("way", ROUND_TRIPS)
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("kind", PICKLED)
def test_round_trip(kind: str, ndim: int, way: str) -> None:
    moving, fixed = pair((16, 18) if ndim == 2 else (16, 10, 9))
    network = pickled_network(kind, ndim).eval()
    expected, expected_record = network.solve(moving, fixed)  # before: what a call keeps must not be in the way
    again = ROUND_TRIPS[way](network)
    assert again is not network and type(again) is type(network)
    ddf, record = again.solve(moving, fixed)
    assert torch.equal(ddf, expected) and torch.equal(record.steps, expected_record.steps)
    assert (again.training, again.solver) == (network.training, network.solver)
    if kind in ("energy", "initial alignment", "a method outside"):
        return
    # on a tape of its own
    network.train(), again.train()
    for one in (network, again):
        (one(moving, fixed)[0] - fixed).square().mean().backward()
    gradients = [[p.grad for p in one.parameters() if p.requires_grad] for one in (network, again)]
    assert gradients[0] and all(map(torch.equal, *gradients)) and any(bool(g.any()) for g in gradients[0])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_loader(context: str) -> None:
    # of all kinds at once: a spawned worker takes seconds to begin
    moving, fixed = (images[0] for images in pair((16, 18)))
    item = {"moving": moving, "fixed": fixed}
    # a spawned process finds no class of this file
    solvers = [FixedPointSolverd(pickled_network(kind, 2)) for kind in PICKLED if kind != "a method outside"]
    data = ConcatDataset([Dataset([item], solver) for solver in solvers])
    loader = DataLoader(data, batch_size=1, num_workers=1, multiprocessing_context=context)
    for solver, batch in zip(solvers, loader, strict=True):
        known = solver(item)
        assert (
            torch.equal(batch["ddf"][0], known["ddf"]) and batch["record"]["steps"].item() == known["record"]["steps"]
        )
