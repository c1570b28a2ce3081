# SPDX-License-Identifier: Apache-2.0
"""VoxelMorph as an update against MONAI's own VoxelMorph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.blocks import Warp
from monai.networks.nets import VoxelMorph, VoxelMorphUNet
from torch.func import functional_call

from monai_deq.networks.blocks import RegistrationCNN, VoxelMorphUpdate
from monai_deq.networks.nets import UnrolledRegistrationNet


def monai_unet(ndim: int) -> VoxelMorphUNet:
    return VoxelMorphUNet(
        spatial_dims=ndim,
        in_channels=2,
        unet_out_channels=32,
        channels=(16, 32, 32, 32, 32, 32, 32, 32),
        final_conv_channels=(16, 16),
    )


def pair(size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    moving, fixed = torch.rand(2, 2, 1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return moving, fixed


def tiny_update(ndim: int, integration_steps: int = 0) -> VoxelMorphUpdate:
    torch.manual_seed(0)
    update = VoxelMorphUpdate(ndim, integration_steps)
    update.backbone = RegistrationCNN(ndim, 2, channels=(4,), flow_std=0.2)  # type: ignore[assignment]
    return update.double()


@pytest.mark.parametrize("ndim", [2, 3])
def test_weights(ndim: int) -> None:
    torch.manual_seed(0)
    update, theirs = VoxelMorphUpdate(ndim), monai_unet(ndim)
    if ndim == 3:
        assert sum(p.numel() for p in update.parameters()) == 327_331
    shapes = {name: p.shape for name, p in theirs.named_parameters()}
    assert {name: p.shape for name, p in update.backbone.named_parameters()} == shapes
    # the last convolution starts next to zero, all others He-normal
    *inner, flow = [p for p in update.parameters() if p.ndim > 1]
    assert flow.shape[0] == ndim and flow.std().item() == pytest.approx(1e-5, rel=0.15)
    for weight in inner:
        fan_in = weight[0].numel()
        assert weight.std().item() == pytest.approx((2 / (1.04 * fan_in)) ** 0.5, rel=0.1)
    assert not any(p.any() for p in update.parameters() if p.ndim == 1)
    moving, fixed = pair((16, 16, 16)[:ndim])
    delta = update.double()(moving, fixed, torch.zeros(2, ndim, *moving.shape[2:], dtype=torch.float64))
    assert 0 < delta.abs().max() < 1e-3


@pytest.mark.parametrize(
    ("size", "integration_steps"), [((16, 32), 0), ((32, 48), 7), ((16, 16, 16), 0), ((16, 16, 16), 3)]
)
def test_one_step_is_monai_voxelmorph(size: tuple[int, ...], integration_steps: int) -> None:
    torch.manual_seed(0)
    ndim = len(size)
    theirs = VoxelMorph(monai_unet(ndim), integration_steps, spatial_dims=ndim).double().eval()
    update = VoxelMorphUpdate(ndim, integration_steps).double()
    update.backbone.load_state_dict(theirs.backbone.state_dict())
    net = UnrolledRegistrationNet(update, steps=1).eval()
    moving, fixed = pair(size)
    with torch.no_grad():
        # displacements of about a voxel: larger ones than MONAI's start gives
        scale = 0.7 / float(theirs(moving, fixed)[1].abs().max())
        for backbone in (theirs.backbone, update.backbone):
            last = [m for m in backbone.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))][-1]
            last.weight *= scale
            last.bias *= scale  # type: ignore[operator]
        expected_warped, expected = theirs(moving, fixed)
        warped, ddf = net(moving, fixed)
    assert expected.abs().max() > 0.5
    # beyond the border theirs sees zeros, ours the border; each squaring carries that a voxel further in
    inside = (..., *(slice(1 + integration_steps, -1 - integration_steps) for _ in size))
    where = inside if integration_steps else ...
    torch.testing.assert_close(ddf[where], expected[where], rtol=0, atol=1e-12)
    torch.testing.assert_close(warped[inside], expected_warped[inside], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(9, 7), (17, 5), (5, 3, 4)])
def test_any_size(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    moving, fixed = pair(size)
    ddf = torch.rand(2, len(size), *size, dtype=torch.float64) - 0.3
    update = VoxelMorphUpdate(len(size), flow_std=0.2).double()
    with torch.no_grad():
        delta = update(moving, fixed, ddf)
        x = np.concatenate([Warp()(moving, ddf), fixed], axis=1)
        padded = torch.from_numpy(np.pad(x, [(0, 0), (0, 0), *((0, -n % 16) for n in size)]))
        expected = update.backbone(padded)[(..., *(slice(n) for n in size))]
        alone = torch.cat([update(moving[i : i + 1], fixed[i : i + 1], ddf[i : i + 1]) for i in range(2)])
    assert expected.std() > 0.05
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(delta, alone, rtol=0, atol=1e-12)


class Given(torch.nn.Module):
    """A backbone that gives one field, whatever it sees."""

    def __init__(self, field: torch.Tensor) -> None:
        super().__init__()
        self.field = field

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.field


def smallest_determinant(ddf: np.ndarray) -> float:
    """Smallest |J| of ``x + ddf`` over the inner voxels, forward differences."""
    ndim = ddf.shape[1]
    phi = ddf + np.indices(ddf.shape[2:])
    base = phi[(..., *[slice(-1)] * ndim)]
    columns = [np.roll(phi, -1, axis=2 + a)[(..., *[slice(-1)] * ndim)] - base for a in range(ndim)]
    return float(np.linalg.det(np.moveaxis(np.stack(columns, axis=1), (1, 2), (-1, -2))).min())


@pytest.mark.parametrize("size", [(20, 17), (12, 10, 11)])
def test_integration_does_not_fold(size: tuple[int, ...]) -> None:
    moving, fixed = pair(size)
    zero = torch.zeros(2, len(size), *size, dtype=torch.float64)
    x = torch.from_numpy(np.indices(size).astype(float))
    waves = [2.3 * torch.sin(0.5 * x[k] + 0.1 * x[k - 1] + k) for k in range(len(size))]
    velocity = torch.stack([torch.stack(waves), torch.stack(waves[::-1])])
    folds = {}
    for steps in (0, 7):
        update = VoxelMorphUpdate(len(size), steps)
        update.backbone = Given(velocity)  # type: ignore[assignment]
        folds[steps] = smallest_determinant(update(moving, fixed, zero).numpy())
    assert folds[0] < -0.2 and folds[7] > 0.0, folds


def test_integration_in_closed_form() -> None:
    # dx/dt = a (x - c) along each axis flows to c + e^a (x - c); a constant velocity to itself, at the border too
    size = (15, 12)
    moving, fixed = pair(size)
    zero = torch.zeros(2, 2, *size, dtype=torch.float64)
    away = torch.from_numpy(np.indices(size) - np.array([7.0, 5.5])[:, None, None])
    update = VoxelMorphUpdate(2, 7)
    update.backbone = Given(-0.4 * away.expand(2, -1, -1, -1))  # type: ignore[assignment]
    expected = (np.exp(-0.4) - 1) * away.expand(2, -1, -1, -1)
    torch.testing.assert_close(update(moving, fixed, zero), expected, rtol=5e-3, atol=0)
    update.backbone = Given(torch.full_like(zero, 2.3))  # type: ignore[assignment]
    torch.testing.assert_close(update(moving, fixed, zero), torch.full_like(zero, 2.3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [(5, 4), (3, 4, 2)])
@pytest.mark.parametrize("integration_steps", [0, 3])
def test_gradient(size: tuple[int, ...], integration_steps: int) -> None:
    moving, fixed = pair(size)
    generator = torch.Generator().manual_seed(0)
    ddf = 0.2 + 0.6 * torch.rand(2, len(size), *size, dtype=torch.float64, generator=generator)
    update = tiny_update(len(size), integration_steps)
    names = [name for name, _ in update.named_parameters()]

    def f(*inputs: torch.Tensor) -> torch.Tensor:
        return functional_call(update, dict(zip(names, inputs[3:], strict=True)), inputs[:3])

    inputs = (*(t.requires_grad_() for t in (moving, fixed, ddf)), *update.parameters())
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("integration_steps", [0, 3])
@pytest.mark.parametrize("around", [False, True])
def test_half_precision(integration_steps: int, around: bool) -> None:
    moving, fixed = (t.float() for t in pair((20, 9)))
    zero = torch.zeros(2, 2, 20, 9)
    torch.manual_seed(0)
    update = VoxelMorphUpdate(2, integration_steps, flow_std=0.05, autocast_dtype=None if around else "bfloat16")
    kinds = []
    update.backbone.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    update.dvf2ddf.register_forward_pre_hook(lambda module, inputs: kinds.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        delta = update(moving, fixed, zero)
    assert kinds == [torch.bfloat16, torch.float32] and delta.dtype == torch.float32
    update.autocast_dtype = None
    expected = update(moving, fixed, zero)
    torch.testing.assert_close(delta, expected, rtol=0, atol=0.05 * float(expected.detach().abs().max()))


def test_errors() -> None:
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3, got 4"):
        VoxelMorphUpdate(4)
    with pytest.raises(ValueError, match="integration_steps must not be negative, got -1"):
        VoxelMorphUpdate(2, -1)
    with pytest.raises(ValueError, match="autocast_dtype must be .*, got 'float32'"):
        VoxelMorphUpdate(2, autocast_dtype="float32")
    with pytest.raises(ValueError, match=r"ddf must have shape \(2, 2, 4, 6\)"):
        tiny_update(2)(*pair((4, 6)), torch.zeros(2, 3, 4, 6))
