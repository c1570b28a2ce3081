# SPDX-License-Identifier: Apache-2.0
"""Compiled backbones give what they gave before."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch.nn as nn

from monai_deq.losses import EquilibriumLoss, RegistrationLoss, StatesLoss
from monai_deq.networks import compile_backbones
from monai_deq.networks.blocks import RegistrationUNet, UNetUpdate
from monai_deq.networks.nets import DEQRegistrationNet, coarse_to_fine


@pytest.fixture
def network() -> DEQRegistrationNet:
    torch.manual_seed(0)
    backbone = RegistrationUNet(2, 4, encoder_channels=(4, 4), decoder_channels=(4,), final_channels=(4,), flow_std=0.1)
    return DEQRegistrationNet(UNetUpdate(2, backbone), max_steps=3, num_states=0, relaxation=0.5)


class TestCompileBackbones:
    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
    def test_solution_and_gradient_are_the_same(self, network):
        moving, fixed = torch.rand(2, 2, 1, 11, 14)
        compiled = compile_backbones(copy.deepcopy(network))
        assert list(compiled.state_dict()) == list(network.state_dict())
        results = []
        for net in (network, compiled):
            with torch.no_grad():
                solved = net.eval()(moving, fixed)[1]
            warped, ddf, _ = net.train()(moving, fixed)
            (warped.square().mean() + ddf.square().mean()).backward()
            results.append((solved, ddf, net.update.backbone.flow.weight.grad))
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert results[0][0].abs().max() > 0.01

    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
    def test_penalty_on_the_contraction_has_the_same_gradient(self, network):
        moving, fixed = torch.rand(2, 1, 1, 11, 14)
        gradients = []
        for net in (network, compile_backbones(copy.deepcopy(network))):
            loss = EquilibriumLoss(StatesLoss(RegistrationLoss(2)), net, contraction_weight=2.0)
            loss(net.train()(moving, fixed), {"moving": moving, "fixed": fixed}).backward()
            gradients.append(net.update.backbone.flow.weight.grad)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)

    def test_penalty_on_the_jacobian_is_refused(self, network):
        EquilibriumLoss(nn.Identity(), network, jacobian_weight=0.5)
        network = compile_backbones(network)
        with pytest.raises(ValueError, match=r"jacobian_weight 0\.5 takes second derivatives.* compile to false"):
            EquilibriumLoss(nn.Identity(), network, jacobian_weight=0.5)
        EquilibriumLoss(nn.Identity(), network, contraction_weight=0.5, residual_weight=0.5, agreement_weight=0.5)

    def test_all_backbones_and_only_when_enabled(self, network):
        network = coarse_to_fine(network, 2, 2)
        assert compile_backbones(network, False) is network
        backbones = [network.update.backbone, network.coarse.update.backbone]
        assert all(b._compiled_call_impl is None for b in backbones)
        assert compile_backbones(network) is network
        assert all(b._compiled_call_impl is not None for b in backbones)

    def test_bad_arguments(self, network):
        with pytest.raises(ValueError, match="Linear has no backbone"):
            compile_backbones(nn.Linear(1, 1))
        with pytest.raises(ValueError, match="enabled"):
            compile_backbones(network, "perhaps")
