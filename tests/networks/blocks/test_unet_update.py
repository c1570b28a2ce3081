# SPDX-License-Identifier: Apache-2.0
"""The U-Net update: what it feeds to its backbone, any size, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.blocks import Warp
from torch.func import functional_call

from monai_deq.networks.blocks import RegistrationCNN, RegistrationUNet, UNetUpdate


def tiny_update(spatial_dims: int) -> UNetUpdate:
    torch.manual_seed(0)
    backbone = RegistrationUNet(
        spatial_dims,
        2 + spatial_dims,
        encoder_channels=(2, 2),
        decoder_channels=(2,),
        final_channels=(2,),
        flow_std=0.5,
    )
    return UNetUpdate(spatial_dims, backbone).double()


def smooth_pair(size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smooth images, and a displacement between the kinks of linear interpolation."""
    x = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in size], indexing="ij"))
    phase = torch.arange(1.0, 1 + len(size), dtype=torch.float64).view(-1, *[1] * len(size))
    moving = torch.stack([0.5 + 0.4 * torch.sin((phase * x).sum(0) / s) for s in (2.0, 3.0)])[:, None]
    fixed = torch.stack([0.5 + 0.4 * torch.cos((phase * x).sum(0) / s) for s in (2.5, 3.5)])[:, None]
    generator = torch.Generator().manual_seed(3)
    ddf = 0.2 + 0.6 * torch.rand(2, len(size), *size, dtype=torch.float64, generator=generator)
    return moving, fixed, ddf


@pytest.mark.parametrize("ndim", [2, 3])
def test_start(ndim: int) -> None:
    torch.manual_seed(0)
    update = UNetUpdate(ndim)
    if ndim == 3:
        assert sum(p.numel() for p in update.parameters()) == 328_627
    weight = update.get_parameter("backbone.encoder.0.conv.weight")
    assert not weight[:, 2:].any() and bool((weight[:, :2] != 0).all())
    size = (9, 7, 5)[:ndim]
    moving, fixed = torch.rand(2, 2, 1, *size)
    delta = update(moving, fixed, torch.zeros(2, ndim, *size))
    assert 0 < delta.abs().max() < 1e-3


@pytest.mark.parametrize("size", [(9, 7), (5, 3, 4)])
def test_with_the_network_of_gradirn(size: tuple[int, ...]) -> None:
    moving, fixed, ddf = smooth_pair(size)
    torch.manual_seed(0)
    backbone = RegistrationCNN(len(size), 2 + len(size), flow_std=0.1).double()
    with torch.no_grad():
        delta = UNetUpdate(len(size), backbone)(moving, fixed, ddf)
        expected = backbone(torch.cat([fixed, Warp()(moving, ddf), ddf], dim=1))
    assert expected.std() > 1e-3
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(16, 32), (16, 16, 32)])
def test_feeds_fixed_warped_ddf(size: tuple[int, ...]) -> None:
    moving, fixed, ddf = smooth_pair(size)
    update = UNetUpdate(len(size)).double()
    with torch.no_grad():
        torch.nn.init.normal_(update.get_parameter("backbone.flow.weight"), std=0.1)
        delta = update(moving, fixed, ddf)
        expected = update.backbone(torch.cat([fixed, Warp()(moving, ddf), ddf], dim=1))
    assert expected.std() > 1e-3
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(16, 32), (16, 16, 32)])
def test_feeds_the_unwarped_image_last(size: tuple[int, ...]) -> None:
    ndim = len(size)
    moving, fixed, ddf = smooth_pair(size)
    torch.manual_seed(0)
    update = UNetUpdate(ndim, unwarped_moving=True).double()
    weight = update.get_parameter("backbone.encoder.0.conv.weight")
    assert weight.shape[1] == 3 + ndim and bool((weight[:, [0, 1, -1]] != 0).all()) and not weight[:, 2:-1].any()
    with torch.no_grad():
        torch.nn.init.normal_(update.get_parameter("backbone.flow.weight"), std=0.1)
        delta = update(moving, fixed, ddf)
        expected = update.backbone(torch.cat([fixed, Warp()(moving, ddf), ddf, moving], dim=1))
    assert expected.std() > 1e-3
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(9, 7), (8, 5), (5, 3, 4)])
def test_any_size(size: tuple[int, ...]) -> None:
    moving, fixed, ddf = smooth_pair(size)
    update = tiny_update(len(size))
    with torch.no_grad():
        delta = update(moving, fixed, ddf)
        x = np.concatenate([fixed, Warp()(moving, ddf), ddf], axis=1)
        padded = np.pad(x, [(0, 0), (0, 0), *((0, n % 2) for n in size)])  # zeros, on the far side
        expected = update.backbone(torch.from_numpy(padded))[(..., *(slice(n) for n in size))]
        alone = torch.cat([update(moving[i : i + 1], fixed[i : i + 1], ddf[i : i + 1]) for i in range(2)])
    assert delta.shape == ddf.shape
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(delta, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(9, 7), (5, 3, 4)])
def test_own_backbone(size: tuple[int, ...]) -> None:
    class Difference(torch.nn.Module):
        """Fixed minus warped in every component; no ``divisor``, so it sees the true size."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert tuple(x.shape[2:]) == size
            return (x[:, :1] - x[:, 1:2]).expand(-1, len(size), *size)

    moving, fixed, ddf = smooth_pair(size)
    delta = UNetUpdate(len(size), Difference())(moving, fixed, ddf)
    for channel in delta.unbind(1):
        torch.testing.assert_close(channel[:, None], fixed - Warp()(moving, ddf), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(9, 7), (5, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backbone_in_half_precision(size: tuple[int, ...], dtype: torch.dtype) -> None:
    moving, fixed, ddf = (t.to(dtype) for t in smooth_pair(size))
    backbone = tiny_update(len(size)).backbone.float()
    kinds = []
    backbone.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    update = UNetUpdate(len(size), backbone, autocast_dtype="bfloat16")
    delta = update(moving.float(), fixed.float(), ddf)
    assert kinds == [torch.bfloat16] and delta.dtype == dtype
    expected = UNetUpdate(len(size), backbone)(moving.float(), fixed.float(), ddf)
    torch.testing.assert_close(delta, expected.to(dtype), rtol=0, atol=0.02 * float(expected.detach().abs().max()))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3, got 1"):
        UNetUpdate(1)
    with pytest.raises(ValueError, match="autocast_dtype must be .*, got 'half'"):
        UNetUpdate(2, autocast_dtype="half")
    with pytest.raises(ValueError, match="unwarped_moving must be true or false, got 'on'"):
        UNetUpdate(2, unwarped_moving="on")  # type: ignore[arg-type]
    # as the command line of monai.bundle hands it on
    assert UNetUpdate(2, unwarped_moving="false").unwarped_moving is False  # type: ignore[arg-type]
    moving, fixed, ddf = smooth_pair((4, 6))
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 6\), got \(2, 4, 4, 6\)"):
        UNetUpdate(2, torch.nn.Identity())(moving, fixed, ddf)
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 6\).*got \(2, 2, 6, 4\)"):
        tiny_update(2)(moving, fixed, ddf.movedim(2, 3))


@pytest.mark.parametrize("size", [(5, 4), (3, 4, 2)])
def test_gradient(size: tuple[int, ...]) -> None:
    moving, fixed, ddf = smooth_pair(size)
    update = tiny_update(len(size))
    names = [name for name, _ in update.named_parameters()]

    def f(ddf: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return functional_call(update, dict(zip(names, parameters, strict=True)), (moving[:1], fixed[:1], ddf))

    inputs = (ddf[:1].requires_grad_(), *update.parameters())
    assert torch.autograd.gradcheck(f, inputs)


def test_gradient_of_default_backbone() -> None:
    moving, fixed, ddf = smooth_pair((16, 16))
    torch.manual_seed(0)
    update = UNetUpdate(2).double()
    # at its initial 1e-5 the gradient would pass unseen below the check's tolerance
    torch.nn.init.normal_(update.get_parameter("backbone.flow.weight"), std=0.3)
    names = [name for name, _ in update.named_parameters()]

    def f(ddf: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return functional_call(update, dict(zip(names, parameters, strict=True)), (moving[:1], fixed[:1], ddf))

    inputs = (ddf[:1].requires_grad_(), *update.parameters())
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
