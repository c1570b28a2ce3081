# SPDX-License-Identifier: Apache-2.0
"""A network with one argument."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from monai_deq.networks.nets import DEQRegistrationNet, PairNetwork


@pytest.mark.parametrize("size", [(9, 12), (8, 9, 10)])
def test_pair_in_displacement_out(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = DEQRegistrationNet(spatial_dims=len(size), max_steps=2, num_states=0).eval()
    nn.init.normal_(network.update.backbone.flow.weight, std=0.1)
    pair = torch.rand(2, 2, *size)
    with torch.no_grad():
        expected = network(pair[:, :1], pair[:, 1:])[1]
        assert torch.equal(PairNetwork(network)(pair), expected)
        # the order is moving, fixed
        assert not torch.allclose(PairNetwork(network)(pair.flip(1)), expected)


def test_weights_have_the_names_of_the_network() -> None:
    network, other = DEQRegistrationNet(spatial_dims=2), DEQRegistrationNet(spatial_dims=2)
    adapter = PairNetwork(other)
    assert list(adapter.state_dict()) == list(network.state_dict())
    adapter.load_state_dict(network.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    # inside another module too
    holder, copy = nn.ModuleDict({"a": adapter}), nn.ModuleDict({"a": PairNetwork(DEQRegistrationNet(spatial_dims=2))})
    assert list(holder.state_dict()) == [f"a.{k}" for k in network.state_dict()]
    copy.load_state_dict(holder.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(holder.parameters(), copy.parameters(), strict=True))


def test_other_shapes_are_refused() -> None:
    for shape in ((1, 1, 8, 8), (2, 8, 8)):
        with pytest.raises(ValueError, match="pair must have the shape"):
            PairNetwork(nn.Identity())(torch.rand(*shape))
