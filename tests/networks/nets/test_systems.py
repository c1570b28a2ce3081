# SPDX-License-Identifier: Apache-2.0
"""The systems by name are the networks put together by hand, weight for weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from nets import pair

from monai_deq.networks.blocks import GradientUpdate, RecurrentUpdate, RegistrationCNN, UNetUpdate, VoxelMorphUpdate
from monai_deq.networks.nets import UnrolledRegistrationNet, gradirn_net, riir_net, unrolling_net, voxelmorph_net

MAE = torch.nn.L1Loss()


def cnn_update(ndim: int) -> UNetUpdate:
    return UNetUpdate(ndim, RegistrationCNN(ndim, 2 + ndim, zero_inputs=range(2, 2 + ndim)))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize(
    ("system", "by_hand"),
    [
        (voxelmorph_net, lambda n: UnrolledRegistrationNet(VoxelMorphUpdate(n), steps=1)),
        (
            partial(voxelmorph_net, integration_steps=3),
            lambda n: UnrolledRegistrationNet(VoxelMorphUpdate(n, 3), steps=1),
        ),
        (unrolling_net, lambda n: UnrolledRegistrationNet([cnn_update(n) for _ in range(3)], steps=[3, 3, 3])),
        (
            partial(unrolling_net, steps=2, num_levels=2),
            lambda n: UnrolledRegistrationNet([cnn_update(n), cnn_update(n)], steps=[2, 2]),
        ),
        (gradirn_net, lambda n: UnrolledRegistrationNet([GradientUpdate(n) for _ in range(3)], steps=[3, 3, 3])),
        (
            partial(gradirn_net, steps=1, num_levels=2, similarity=MAE),
            lambda n: UnrolledRegistrationNet([GradientUpdate(n, MAE), GradientUpdate(n, MAE)], steps=[1, 1]),
        ),
        (riir_net, lambda n: UnrolledRegistrationNet(RecurrentUpdate(n), steps=6, all_states=True)),
        (
            partial(riir_net, steps=2, similarity=MAE),
            lambda n: UnrolledRegistrationNet(RecurrentUpdate(n, MAE), steps=2, all_states=True),
        ),
    ],
)
def test_put_together_by_hand(
    system: Callable[[int], UnrolledRegistrationNet], by_hand: Callable[[int], UnrolledRegistrationNet], ndim: int
) -> None:
    networks = []
    for build in (system, by_hand):
        torch.manual_seed(0)
        networks.append(build(ndim))
    got, expected = networks
    assert str(got) == str(expected) and got.steps == expected.steps and got.all_states == expected.all_states
    for (name, value), (other, same) in zip(got.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other and torch.equal(value, same)
    if ndim == 2:
        moving, fixed = pair((16, 20))
        for value, same in zip(got.eval()(moving, fixed), expected.eval()(moving, fixed), strict=True):
            assert torch.equal(value, same)
        states, others = (net.train()(moving, fixed)[2] for net in networks)
        assert len(states) == (got.steps[0] - 1 if got.all_states else 0)
        assert all(torch.equal(a, b) for a, b in zip(states, others, strict=True))


def test_parameters_in_3d() -> None:
    counts = {
        build: sum(p.numel() for p in build(3).parameters()) for build in (voxelmorph_net, unrolling_net, gradirn_net)
    }
    assert counts == {voxelmorph_net: 327_331, unrolling_net: 3 * 89_987, gradirn_net: 269_964}


@pytest.mark.parametrize("system", [voxelmorph_net, unrolling_net, gradirn_net, riir_net])
def test_half_precision_for_the_backbones(system: Callable[..., UnrolledRegistrationNet]) -> None:
    for name in (None, "bfloat16"):
        assert {update.autocast_dtype for update in system(2, autocast_dtype=name).updates} == {name}
    assert system().updates[0].spatial_dims == 3
