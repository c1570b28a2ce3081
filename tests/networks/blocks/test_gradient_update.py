# SPDX-License-Identifier: Apache-2.0
"""The update of GraDIRN: its formula, plain gradient descent without its network, gradients of the second order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.losses import GlobalMutualInformationLoss, LocalNormalizedCrossCorrelationLoss
from monai.networks.blocks import Warp
from torch.func import functional_call

from monai_deq.networks.blocks import GradientUpdate, RegistrationCNN

SIZES = [(5, 7), (4, 3, 6)]


def losses(ndim: int) -> list[torch.nn.Module]:
    return [
        torch.nn.MSELoss(),
        LocalNormalizedCrossCorrelationLoss(spatial_dims=ndim, kernel_size=3),
        GlobalMutualInformationLoss(num_bins=6),
    ]


def tiny_update(ndim: int, similarity: torch.nn.Module | None = None) -> GradientUpdate:
    torch.manual_seed(0)
    backbone = RegistrationCNN(ndim, 2 + ndim, channels=(4,), flow_std=0.2)
    return GradientUpdate(ndim, similarity, step_size=0.3, backbone=backbone).double()


def without_network(update: GradientUpdate) -> GradientUpdate:
    for p in update.backbone.parameters():
        torch.nn.init.zeros_(p)
    return update


def problem(size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random images in (0, 1), and displacements that sample between the kinks of linear interpolation."""
    generator = torch.Generator().manual_seed(sum(size))
    moving, fixed = 0.1 + 0.8 * torch.rand(2, 2, 1, *size, dtype=torch.float64, generator=generator)
    whole = torch.randint(-1, 2, (2, len(size), *size), generator=generator)
    return moving, fixed, whole + 0.2 + 0.6 * torch.rand(whole.shape, dtype=torch.float64, generator=generator)


def blobs(size: tuple[int, ...], shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gaussian in the middle of each image, and the same ``shift`` voxels further along the first axis."""
    x = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in size], indexing="ij"))
    middle = torch.tensor([(n - 1) / 2 for n in size], dtype=torch.float64).view(-1, *[1] * len(size))
    along = torch.zeros_like(middle)
    along[0] = shift

    def blob(where: torch.Tensor) -> torch.Tensor:
        return torch.exp(-(x - where).square().sum(0) / (2 * 1.5**2))

    heights = torch.tensor([1.0, 0.7], dtype=torch.float64).view(2, 1, *[1] * len(size))
    return heights * blob(middle + along), heights * blob(middle)


def test_number_of_parameters() -> None:
    def count(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for m in modules for p in m.parameters())

    levels = [GradientUpdate(3) for _ in range(3)]
    assert count(*levels) == 269_964 and count(levels[0].backbone) == 89_987
    # (4 * 9 + 1) * 32 + 3 * (32 * 9 + 1) * 32 + (32 * 9 + 1) * 2, and the step
    assert count(GradientUpdate(2)) == 37 * 32 + 3 * 289 * 32 + 289 * 2 + 1


@pytest.mark.parametrize("ndim", [2, 3])
def test_start(ndim: int) -> None:
    torch.manual_seed(0)
    update = GradientUpdate(ndim)
    assert update.step_size.item() == 0.5 and update.step_size.requires_grad
    weight = update.backbone.first_conv.weight  # type: ignore[union-attr]
    assert not weight[:, :ndim].any() and bool((weight[:, ndim:] != 0).all())  # type: ignore[index]
    # the displacement, though thousands of times an intensity, is not fed back
    x = torch.rand(2, ndim + 2, *(8, 7, 6)[:ndim])
    far = torch.cat([1e3 * x[:, :ndim], x[:, ndim:]], dim=1)
    assert torch.equal(update.backbone(x), update.backbone(far))
    assert 0 < update.backbone(x).abs().max() < 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_what_its_network_sees(size: tuple[int, ...]) -> None:
    moving, fixed, ddf = problem(size)
    update = tiny_update(len(size))
    torch.nn.init.zeros_(update.step_size)
    with torch.no_grad():
        expected = -update.backbone(torch.cat([ddf, fixed, Warp()(moving, ddf)], dim=1))
        delta = update(moving, fixed, ddf)
    assert expected.std() > 0.1
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", range(3))
def test_without_its_network_it_goes_down_the_gradient(size: tuple[int, ...], kind: int) -> None:
    moving, fixed, ddf = problem(size)
    loss = losses(len(size))[kind]
    update = without_network(tiny_update(len(size), loss))
    with torch.no_grad():
        delta = update(moving, fixed, ddf).flatten()
    warp, count, flat = Warp(), 2 * int(np.prod(size)), ddf.flatten()
    for k in range(0, len(flat), 13):
        values = []
        for step in (1e-5, -1e-5):
            moved = flat.clone()
            moved[k] += step
            values.append(float(loss(warp(moving, moved.view_as(ddf)), fixed)))
        expected = -0.3 * count * (values[0] - values[1]) / 2e-5
        assert float(delta[k]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("size", [(13, 11), (9, 8, 7)])
def test_gradient_descent(size: tuple[int, ...]) -> None:
    moving, fixed = blobs(size, 0.4)
    update = without_network(GradientUpdate(len(size)).double())
    ddf, warp = torch.zeros(2, len(size), *size, dtype=torch.float64), Warp()
    errors = [(moving - fixed).square().mean(dim=tuple(range(1, moving.ndim)))]
    with torch.no_grad():
        for _ in range(8):
            ddf = ddf + update(moving, fixed, ddf)
            errors.append((warp(moving, ddf) - fixed).square().mean(dim=tuple(range(1, moving.ndim))))
    trace = torch.stack(errors)
    assert bool((trace.diff(dim=0) < 0).all())
    assert bool((trace[-1] < 0.8 * trace[0]).all())
    # towards the shift, and so from the first step: a small voxel step in the right direction
    middle = tuple(n // 2 for n in size)
    assert bool((ddf[(slice(None), 0, middle[0] - 2, *middle[1:])] > 0.05).all())


@pytest.mark.parametrize("size", [(3, 5), (2, 3, 4)])
@pytest.mark.parametrize("kind", range(3))
def test_gradient(size: tuple[int, ...], kind: int) -> None:
    moving, fixed, ddf = problem(size)
    update = tiny_update(len(size), losses(len(size))[kind])
    names = [name for name, _ in update.named_parameters()]

    def f(*inputs: torch.Tensor) -> torch.Tensor:
        return functional_call(update, dict(zip(names, inputs[3:], strict=True)), inputs[:3])

    inputs = (*(t.requires_grad_() for t in (moving, fixed, ddf)), *update.parameters())
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


def test_gradient_entry_by_entry() -> None:
    moving, fixed, ddf = problem((3, 4))
    update = tiny_update(2)
    ddf.requires_grad_()
    assert torch.autograd.gradcheck(lambda u: update(moving, fixed, u), (ddf,))


@pytest.mark.parametrize("size", SIZES)
def test_items_alone_and_meta_tensors(size: tuple[int, ...]) -> None:
    moving, fixed, ddf = problem(size)
    update = tiny_update(len(size))
    together = update(moving, fixed, ddf)
    for i in range(2):
        one = slice(i, i + 1)
        torch.testing.assert_close(update(moving[one], fixed[one], ddf[one]), together[one], rtol=0, atol=1e-12)
    meta = update(MetaTensor(moving), MetaTensor(fixed), ddf)
    torch.testing.assert_close(torch.Tensor(meta.detach()), torch.Tensor(together.detach()))


@pytest.mark.parametrize("size", [(5, 7), (4, 3, 6)])
def test_half_precision(size: tuple[int, ...]) -> None:
    moving, fixed, ddf = (t.float() for t in problem(size))
    backbone = tiny_update(len(size)).backbone.float()
    kinds = []
    backbone.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    update = GradientUpdate(len(size), backbone=backbone, autocast_dtype="bfloat16")
    delta = update(moving, fixed, ddf)
    with torch.autocast("cpu", torch.bfloat16):
        around = GradientUpdate(len(size), backbone=backbone)(moving, fixed, ddf)
    assert kinds == [torch.bfloat16] * 2 and delta.dtype == around.dtype == torch.float32
    expected = GradientUpdate(len(size), backbone=backbone)(moving, fixed, ddf)
    for value in (delta, around):
        torch.testing.assert_close(value, expected, rtol=0, atol=0.02 * float(expected.detach().abs().max()))
    # the gradient of the similarity is not rounded
    torch.nn.init.zeros_(backbone.flow.weight)  # type: ignore[union-attr,arg-type]
    assert torch.equal(update(moving, fixed, ddf), GradientUpdate(len(size), backbone=backbone)(moving, fixed, ddf))


def test_errors() -> None:
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3, got 1"):
        GradientUpdate(1)
    for step in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"step_size must not be negative, got {step}"):
            GradientUpdate(2, step_size=step)
    with pytest.raises(ValueError, match="autocast_dtype must be .*, got 'half'"):
        GradientUpdate(2, autocast_dtype="half")
    moving, fixed, ddf = problem((4, 6))
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 6\), got \(2, 4, 4, 6\)"):
        GradientUpdate(2, backbone=torch.nn.Identity())(moving, fixed, ddf)
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 6\).*got \(2, 3, 4, 6\)"):
        tiny_update(2)(moving, fixed, torch.zeros(2, 3, 4, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\(B, 5, 2 spatial sizes\), got \(2, 4, 4, 6\)"):
        GradientUpdate(2, backbone=RegistrationCNN(2, 5).double()).double()(moving, fixed, ddf)
