# SPDX-License-Identifier: Apache-2.0
"""Compiled backbones give what they gave before; weights lie in memory as their convolutions like it."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch.nn as nn
from nets import deq_net, pair, rest_settings, tiny_update

from monai_deq.losses import EquilibriumLoss, RegistrationLoss, StatesLoss
from monai_deq.networks import compile_backbones, on_device
from monai_deq.networks.blocks import RegistrationCNN, UNetUpdate
from monai_deq.networks.nets import DEQRegistrationNet, coarse_to_fine, voxelmorph_net


@pytest.fixture
def network() -> DEQRegistrationNet:
    return deq_net(tiny_update(2, 0.1), max_steps=3, num_states=0, relaxation=0.5)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """What is compiled, without a compiler."""
    seen: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, dynamic=None: seen.append(self))
    return seen


def results(net: DEQRegistrationNet) -> list[torch.Tensor]:
    """Solution, training, and gradient by the steps themselves and by the penalty on the contraction."""
    moving, fixed = pair((8, 10))
    loss = EquilibriumLoss(StatesLoss(RegistrationLoss(2)), net, rest_settings(contraction_weight=2.0))
    with torch.no_grad():
        solved = net.eval()(moving, fixed)[1]
    prediction = net.train()(moving, fixed)
    value = loss(prediction, {"moving": moving, "fixed": fixed})
    value.backward()
    return [solved, prediction[1], value, net.update.backbone.flow.weight.grad]


class TestCompileBackbones:
    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
    def test_solution_and_gradients_are_the_same(self):
        torch.manual_seed(0)
        # the fewest kernels that a compiler can be given
        network = deq_net(UNetUpdate(2, RegistrationCNN(2, 4, channels=(3,), flow_std=0.1)), max_steps=3, num_states=0)
        compiled = compile_backbones(copy.deepcopy(network))
        assert list(compiled.state_dict()) == list(network.state_dict())
        expected = results(network)
        torch.testing.assert_close(results(compiled), expected, rtol=1e-4, atol=1e-5)
        assert expected[0].abs().max() > 0.01

    def test_the_unet_is_one_graph(self, network):
        traced = copy.deepcopy(network)
        traced.update.backbone.compile(backend="aot_eager", dynamic=False, fullgraph=True)
        expected = results(network)
        torch.testing.assert_close(results(traced), expected, rtol=1e-4, atol=1e-5)
        assert expected[0].abs().max() > 0.01

    def test_all_backbones_once(self, network, compiled):
        network = coarse_to_fine(network, 2, 2)
        assert compile_backbones(network) is network
        assert set(compiled) == {network.update.backbone, network.coarse.update.backbone} and len(compiled) == 2
        # shared by the levels of the network
        update = tiny_update(2)
        compiled.clear()
        compile_backbones(nn.ModuleList([update, nn.Sequential(update)]))
        assert compiled == [update.backbone]

    def test_without_a_backbone(self):
        with pytest.raises(ValueError, match="Linear has no backbone that could be compiled"):
            compile_backbones(nn.Linear(1, 1))


class TestOnDevice:
    @pytest.mark.parametrize("ndim", [2, 3])
    def test_channels_last_on_a_cpu(self, ndim):
        network = voxelmorph_net(ndim)
        weights = {name: value.clone() for name, value in network.state_dict().items()}
        moving, fixed = pair((16, 16, 16)[:ndim], batch=1)
        expected = network.eval()(moving, fixed)[1]
        assert on_device(network, "cpu") is network
        memory_format = torch.channels_last if ndim == 2 else torch.channels_last_3d
        kernels = [p for p in network.parameters() if p.ndim == ndim + 2]
        assert kernels and all(p.is_contiguous(memory_format=memory_format) for p in kernels)
        assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
        torch.testing.assert_close(network(moving, fixed)[1], expected, rtol=1e-4, atol=1e-9)

    def test_elsewhere_the_format_stays(self):
        network = on_device(voxelmorph_net(2), torch.device("meta"))
        kernels = [p for p in network.parameters() if p.ndim == 4]
        assert all(p.device.type == "meta" and p.is_contiguous() for p in kernels)

    def test_without_convolutions(self):
        for module in (nn.Linear(3, 2), nn.Identity()):
            assert on_device(module, torch.device("cpu")) is module

    def test_compiled_where_asked_for(self, network, compiled):
        assert on_device(network, "cpu") is network and not compiled
        assert on_device(network, "cpu", compiled=True) is network and compiled == [network.update.backbone]
