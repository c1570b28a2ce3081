# SPDX-License-Identifier: Apache-2.0
"""The updates: their formulas by hand, what their networks see, gradients of first and second order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.losses import GlobalMutualInformationLoss, LocalNormalizedCrossCorrelationLoss
from monai.networks.blocks import Warp
from monai.networks.nets import VoxelMorph, VoxelMorphUNet
from nets import pair, tiny_recurrent_update, tiny_update
from torch.func import functional_call

from monai_deq.networks.blocks import (
    GradientUpdate,
    RecurrentUpdate,
    RegistrationCNN,
    RegistrationUpdate,
    UNetUpdate,
    VoxelMorphUpdate,
    similarity_gradient,
    warp_by_ddf,
)
from monai_deq.networks.nets import UnrolledRegistrationNet

SIZES = [(5, 7), (4, 3, 6)]
UNET_SIZES = [(9, 7), (5, 3, 4)]


def losses(ndim: int) -> list[torch.nn.Module]:
    return [
        torch.nn.MSELoss(),
        LocalNormalizedCrossCorrelationLoss(spatial_dims=ndim, kernel_size=3),
        GlobalMutualInformationLoss(num_bins=6),
    ]


def problem(size: tuple[int, ...], batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random images in (0, 1), and displacements that sample between the kinks of linear interpolation."""
    generator = torch.Generator().manual_seed(sum(size))
    moving, fixed = 0.1 + 0.8 * torch.rand(2, batch, 1, *size, dtype=torch.float64, generator=generator)
    whole = torch.randint(-1, 2, (batch, len(size), *size), generator=generator)
    part = 0.2 + 0.6 * torch.rand(whole.shape, dtype=torch.float64, generator=generator)
    return moving, fixed, whole + part


def assert_differentiable(update: torch.nn.Module, inputs: list[torch.Tensor], fast_mode: bool = True) -> None:
    """The gradients by inputs and weights are those of finite differences."""
    names, count = [name for name, _ in update.named_parameters()], len(inputs)

    def f(*tensors: torch.Tensor) -> torch.Tensor:
        weights = dict(zip(names, tensors[count:], strict=True))
        return functional_call(update, weights, tensors[:count])

    arguments = (*(t.requires_grad_() for t in inputs), *update.parameters())
    assert torch.autograd.gradcheck(f, arguments, fast_mode=fast_mode)


@pytest.mark.parametrize("kind", [RegistrationUpdate, UNetUpdate, GradientUpdate, RecurrentUpdate, VoxelMorphUpdate])
def test_arguments_of_all_updates(kind: type[RegistrationUpdate]) -> None:
    for wrong in (1, 4):
        with pytest.raises(ValueError, match=f"spatial_dims must be 2 or 3, got {wrong}"):
            kind(wrong)
    for name in ("float32", "half", ""):
        with pytest.raises(ValueError, match=f'autocast_dtype must be None, "bfloat16" or "float16", got {name!r}'):
            kind(2, autocast_dtype=name)
    assert kind(2, autocast_dtype="float16").autocast_dtype == "float16"


def test_displacements_of_another_shape_are_refused() -> None:
    moving, fixed, ddf = problem((4, 6))
    for kind in (UNetUpdate, GradientUpdate):
        with pytest.raises(ValueError, match=r"\(2, 2, 4, 6\), got \(2, 4, 4, 6\)"):
            kind(2, backbone=torch.nn.Identity())(moving, fixed, ddf)
    gradient = GradientUpdate(2, backbone=RegistrationCNN(2, 4, channels=(2,))).double()
    for update in (tiny_update(2).double(), gradient, VoxelMorphUpdate(2).double()):
        with pytest.raises(ValueError, match=r"ddf must have shape \(2, 2, 4, 6\).*got \(2, 3, 4, 6\)"):
            update(moving, fixed, torch.zeros(2, 3, 4, 6, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"\(2, 2, 4, 6\).*got \(2, 2, 6, 4\)"):
            update(moving, fixed, ddf.movedim(2, 3))
    with pytest.raises(ValueError, match=r"\(B, 5, 2 spatial sizes\), got \(2, 4, 4, 6\)"):
        GradientUpdate(2, backbone=RegistrationCNN(2, 5).double()).double()(moving, fixed, ddf)


# --- UNetUpdate -------------------------------------------------------------------------------------------------------


def seen_update(spatial_dims: int) -> UNetUpdate:
    return tiny_update(spatial_dims, 0.5).double()


class FixedPair(torch.nn.Module):
    """An update of one pair."""

    def __init__(self, update: torch.nn.Module, moving: torch.Tensor, fixed: torch.Tensor) -> None:
        super().__init__()
        self.update, self.images = update, (moving, fixed)

    def forward(self, ddf: torch.Tensor) -> torch.Tensor:
        return self.update(*self.images, ddf)


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
def test_start_of_the_unet_update(ndim: int) -> None:
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
    assert UNetUpdate(ndim).backbone.checkpoint_parts == 0
    assert UNetUpdate(ndim, checkpoint_parts=2).backbone.checkpoint_parts == 2


@pytest.mark.parametrize("size", UNET_SIZES)
def test_unet_update_with_the_network_of_gradirn(size: tuple[int, ...]) -> None:
    moving, fixed, ddf = smooth_pair(size)
    torch.manual_seed(0)
    backbone = RegistrationCNN(len(size), 2 + len(size), flow_std=0.1).double()
    with torch.no_grad():
        delta = UNetUpdate(len(size), backbone)(moving, fixed, ddf)
        expected = backbone(torch.cat([fixed, Warp()(moving, ddf), ddf], dim=1))
    assert expected.std() > 1e-3
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(8, 12), (4, 8, 6)])
def test_unet_update_feeds_fixed_warped_ddf(size: tuple[int, ...]) -> None:
    moving, fixed, ddf = smooth_pair(size)
    update = seen_update(len(size))
    with torch.no_grad():
        delta = update(moving, fixed, ddf)
        expected = update.backbone(torch.cat([fixed, Warp()(moving, ddf), ddf], dim=1))
    assert expected.std() > 1e-3
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(9, 7), (8, 5), (5, 3, 4)])
def test_unet_update_at_any_size(size: tuple[int, ...]) -> None:
    moving, fixed, ddf = smooth_pair(size)
    update = seen_update(len(size))
    with torch.no_grad():
        delta = update(moving, fixed, ddf)
        x = np.concatenate([fixed, Warp()(moving, ddf), ddf], axis=1)
        padded = np.pad(x, [(0, 0), (0, 0), *((0, n % 2) for n in size)])  # zeros, on the far side
        expected = update.backbone(torch.from_numpy(padded))[(..., *(slice(n) for n in size))]
        alone = torch.cat([update(moving[i : i + 1], fixed[i : i + 1], ddf[i : i + 1]) for i in range(2)])
    assert delta.shape == ddf.shape
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(delta, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", UNET_SIZES)
def test_unet_update_with_an_own_backbone(size: tuple[int, ...]) -> None:
    class Difference(torch.nn.Module):
        """Fixed minus warped in every component; no ``divisor``, so it sees the true size."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert tuple(x.shape[2:]) == size
            return (x[:, :1] - x[:, 1:2]).expand(-1, len(size), *size)

    moving, fixed, ddf = smooth_pair(size)
    delta = UNetUpdate(len(size), Difference())(moving, fixed, ddf)
    for channel in delta.unbind(1):
        torch.testing.assert_close(channel[:, None], fixed - Warp()(moving, ddf), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", UNET_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unet_update_in_half_precision(size: tuple[int, ...], dtype: torch.dtype) -> None:
    moving, fixed, ddf = (t.to(dtype) for t in smooth_pair(size))
    backbone = seen_update(len(size)).backbone.float()
    kinds = []
    backbone.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    update = UNetUpdate(len(size), backbone, autocast_dtype="bfloat16")
    delta = update(moving.float(), fixed.float(), ddf)
    assert kinds == [torch.bfloat16] and delta.dtype == dtype
    expected = UNetUpdate(len(size), backbone)(moving.float(), fixed.float(), ddf)
    torch.testing.assert_close(delta, expected.to(dtype), rtol=0, atol=0.02 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("size", [(5, 4), (3, 4, 2)])
def test_gradient_of_the_unet_update(size: tuple[int, ...]) -> None:
    moving, fixed, ddf = smooth_pair(size)
    update = FixedPair(seen_update(len(size)), moving[:1], fixed[:1])
    assert_differentiable(update, [ddf[:1]], fast_mode=len(size) == 3)


def test_gradient_of_the_default_unet() -> None:
    moving, fixed, ddf = smooth_pair((16, 16))
    torch.manual_seed(0)
    update = UNetUpdate(2).double()
    # at its initial 1e-5 the gradient would pass unseen below the check's tolerance
    torch.nn.init.normal_(update.get_parameter("backbone.flow.weight"), std=0.3)
    assert_differentiable(FixedPair(update, moving[:1], fixed[:1]), [ddf[:1]])


# --- similarity_gradient ----------------------------------------------------------------------------------------------


def inside(size: tuple[int, ...], batch: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Displacements that end inside the image: the voxel below, the part of the cell, the displacement itself."""
    rng = np.random.default_rng(1)
    grid = np.broadcast_to(np.indices(size), (batch, len(size), *size))
    below = np.stack([rng.integers(0, n - 1, (batch, *size)) for n in size], axis=1)
    part = rng.uniform(0.05, 0.95, grid.shape)
    return below, part, below + part - grid


@pytest.mark.parametrize("size", [(5, 7), (9, 4), (4, 3, 6)])
def test_similarity_gradient_of_the_squared_error(size: tuple[int, ...]) -> None:
    # I = a x0^2 + b x1 + c x0 x1 (+ d x2): between i and i + 1 the interpolant of x0^2 is i^2 + (2 i + 1) (x0 - i)
    below, part, ddf = inside(size)
    x = below + part
    scales = np.asarray([1.0, -0.5]).reshape(2, *[1] * len(size))  # one image an item
    grid = np.indices(size).astype(float)
    image = 0.02 * grid[0] ** 2 + 0.05 * grid[1] + 0.03 * grid[0] * grid[1] + sum(0.04 * g for g in grid[2:])
    squared = below[:, 0] ** 2 + (2 * below[:, 0] + 1) * part[:, 0]
    warped = scales * (0.02 * squared + 0.05 * x[:, 1] + 0.03 * x[:, 0] * x[:, 1] + sum(0.04 * x[:, 2:].swapaxes(0, 1)))
    slopes = [0.02 * (2 * below[:, 0] + 1) + 0.03 * x[:, 1], 0.05 + 0.03 * x[:, 0]]
    slopes += [np.full_like(x[:, 0], 0.04)] * (len(size) - 2)
    fixed = np.random.default_rng(2).uniform(size=(2, *size))
    expected = np.stack([2 * (warped - fixed) * scales * s for s in slopes], axis=1)

    moving = torch.from_numpy(scales * image)[:, None]
    gradient, at = similarity_gradient(
        torch.nn.MSELoss(), moving, torch.from_numpy(fixed)[:, None], torch.from_numpy(ddf)
    )
    np.testing.assert_allclose(at.detach()[:, 0], warped, rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradient.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", range(3))
def test_similarity_gradient_of_items_alone(size: tuple[int, ...], kind: int) -> None:
    loss = losses(len(size))[kind]
    moving, fixed, ddf = problem(size)
    together, warped = similarity_gradient(loss, moving, fixed, ddf)
    for i in range(2):
        one = slice(i, i + 1)
        alone, at = similarity_gradient(loss, moving[one], fixed[one], ddf[one])
        assert alone.abs().max() > 1e-3
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(warped[one], at, rtol=0, atol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", range(3))
def test_similarity_gradient_by_finite_differences(size: tuple[int, ...], kind: int) -> None:
    loss = losses(len(size))[kind]
    moving, fixed, ddf = problem(size)
    gradient, _ = similarity_gradient(loss, moving, fixed, ddf)
    count = 2 * int(np.prod(size))
    flat = ddf.flatten()
    for k in range(0, len(flat), 11):
        values = []
        for step in (1e-5, -1e-5):
            moved = flat.clone()
            moved[k] += step
            values.append(float(loss(warp_by_ddf(moving, moved.view_as(ddf)), fixed)))
        slope = count * (values[0] - values[1]) / 2e-5
        assert float(gradient.flatten()[k]) == pytest.approx(slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", range(3))
def test_second_derivatives_of_the_similarity(size: tuple[int, ...], kind: int) -> None:
    loss = losses(len(size))[kind]
    inputs = [t.requires_grad_() for t in problem(size)]

    def f(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return similarity_gradient(loss, *inputs)

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    # the images alone: the displacement at the first step needs no gradient
    ddf = inputs.pop().detach()
    assert torch.autograd.gradcheck(lambda m, x: similarity_gradient(loss, m, x, ddf), inputs, fast_mode=True)


def test_second_derivatives_of_the_similarity_entry_by_entry() -> None:
    moving, fixed, ddf = problem((3, 4))
    loss = losses(2)[1]
    ddf.requires_grad_()
    assert torch.autograd.gradcheck(lambda u: similarity_gradient(loss, moving, fixed, u)[0], (ddf,))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_similarity_gradient_where_gradients_are_off(size: tuple[int, ...], mode: type) -> None:
    moving, fixed, ddf = problem(size)
    expected, at = similarity_gradient(torch.nn.MSELoss(), moving, fixed, ddf)
    with mode():
        for inputs in ((moving, fixed, ddf), tuple(t.clone() for t in (moving, fixed, ddf))):  # those of the mode too
            gradient, warped = similarity_gradient(torch.nn.MSELoss(), *inputs)
            assert not gradient.requires_grad and not warped.requires_grad
            assert gradient.grad_fn is None
            assert torch.equal(gradient, expected) and torch.equal(warped, at)
            assert not torch.is_grad_enabled()
    assert not ddf.requires_grad and torch.is_grad_enabled()
    # what needs gradients elsewhere is left as it is
    ddf.requires_grad_()
    with torch.no_grad():
        similarity_gradient(torch.nn.MSELoss(), moving.requires_grad_(), fixed, ddf)
    assert ddf.grad is None and moving.grad is None


@pytest.mark.parametrize("kind", range(3))
def test_similarity_gradient_is_float32_under_autocast(kind: int) -> None:
    moving, fixed, ddf = (t.float() for t in problem((6, 5)))
    seen = []

    class Seen(torch.nn.Module):
        def forward(self, warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
            seen.extend([warped.dtype, fixed.dtype, torch.is_autocast_enabled("cpu")])
            return losses(2)[kind](warped, fixed)

    expected, _ = similarity_gradient(Seen(), moving, fixed, ddf)
    with torch.autocast("cpu", torch.bfloat16):
        gradient, _ = similarity_gradient(Seen(), moving, fixed, ddf)
        rounded, warped = similarity_gradient(Seen(), moving.bfloat16(), fixed.bfloat16(), ddf)
    assert gradient.dtype == rounded.dtype == torch.float32 and warped.dtype == torch.bfloat16
    assert torch.equal(gradient, expected)
    assert seen == [torch.float32, torch.float32, False] * 3
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0.1 * float(expected.detach().abs().max()))


class Blind(torch.nn.Module):
    def forward(self, warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return fixed.mean()


def test_similarities_that_do_not_fit() -> None:
    moving, fixed, ddf = problem((4, 5))
    with pytest.raises(ValueError, match=r"MSELoss must give one number .*got shape \(2, 1, 4, 5\)"):
        similarity_gradient(torch.nn.MSELoss(reduction="none"), moving, fixed, ddf)
    with pytest.raises(ValueError, match=r"Blind must give one number .*got shape \(\) without a gradient"):
        similarity_gradient(Blind(), moving, fixed, ddf)
    with pytest.raises(ValueError, match=r"ddf must have shape \(2, 2, 4, 5\)"):
        similarity_gradient(torch.nn.MSELoss(), moving, fixed, ddf[:, :1])


# --- GradientUpdate ---------------------------------------------------------------------------------------------------


def tiny_gradient_update(ndim: int, similarity: torch.nn.Module | None = None) -> GradientUpdate:
    torch.manual_seed(0)
    backbone = RegistrationCNN(ndim, 2 + ndim, channels=(4,), flow_std=0.2)
    return GradientUpdate(ndim, similarity, step_size=0.3, backbone=backbone).double()


def without_network(update: GradientUpdate) -> GradientUpdate:
    for p in update.backbone.parameters():
        torch.nn.init.zeros_(p)
    return update


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


def test_number_of_parameters_of_gradirn() -> None:
    def count(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for m in modules for p in m.parameters())

    levels = [GradientUpdate(3) for _ in range(3)]
    assert count(*levels) == 269_964 and count(levels[0].backbone) == 89_987
    # (4 * 9 + 1) * 32 + 3 * (32 * 9 + 1) * 32 + (32 * 9 + 1) * 2, and the step
    assert count(GradientUpdate(2)) == 37 * 32 + 3 * 289 * 32 + 289 * 2 + 1


@pytest.mark.parametrize("ndim", [2, 3])
def test_start_of_the_gradient_update(ndim: int) -> None:
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
def test_what_the_network_of_gradirn_sees(size: tuple[int, ...]) -> None:
    moving, fixed, ddf = problem(size)
    update = tiny_gradient_update(len(size))
    torch.nn.init.zeros_(update.step_size)
    with torch.no_grad():
        expected = -update.backbone(torch.cat([ddf, fixed, Warp()(moving, ddf)], dim=1))
        delta = update(moving, fixed, ddf)
    assert expected.std() > 0.1
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", range(3))
def test_gradient_update_without_its_network_goes_down_the_gradient(size: tuple[int, ...], kind: int) -> None:
    moving, fixed, ddf = problem(size)
    loss = losses(len(size))[kind]
    update = without_network(tiny_gradient_update(len(size), loss))
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
def test_gradient_of_the_gradient_update(size: tuple[int, ...], kind: int) -> None:
    assert_differentiable(tiny_gradient_update(len(size), losses(len(size))[kind]), list(problem(size)))


def test_gradient_of_the_gradient_update_entry_by_entry() -> None:
    moving, fixed, ddf = problem((3, 4))
    update = tiny_gradient_update(2)
    ddf.requires_grad_()
    assert torch.autograd.gradcheck(lambda u: update(moving, fixed, u), (ddf,))


@pytest.mark.parametrize("size", SIZES)
def test_gradient_update_of_items_alone_and_of_meta_tensors(size: tuple[int, ...]) -> None:
    moving, fixed, ddf = problem(size)
    update = tiny_gradient_update(len(size))
    together = update(moving, fixed, ddf)
    for i in range(2):
        one = slice(i, i + 1)
        torch.testing.assert_close(update(moving[one], fixed[one], ddf[one]), together[one], rtol=0, atol=1e-12)
    meta = update(MetaTensor(moving), MetaTensor(fixed), ddf)
    torch.testing.assert_close(torch.Tensor(meta.detach()), torch.Tensor(together.detach()))


@pytest.mark.parametrize("size", [(5, 7), (4, 3, 6)])
def test_gradient_update_in_half_precision(size: tuple[int, ...]) -> None:
    moving, fixed, ddf = (t.float() for t in problem(size))
    backbone = tiny_gradient_update(len(size)).backbone.float()
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


def test_wrong_steps_of_the_gradient_update() -> None:
    for step in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"step_size must not be negative, got {step}"):
            GradientUpdate(2, step_size=step)


# --- RecurrentUpdate --------------------------------------------------------------------------------------------------


def seen_recurrent_update(
    ndim: int, similarity: torch.nn.Module | None = None, autocast_dtype: str | None = None
) -> RecurrentUpdate:
    return tiny_recurrent_update(ndim, similarity, autocast_dtype).double()


def recurrent_problem(size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """With a hidden state."""
    generator = torch.Generator().manual_seed(sum(size))
    return *problem(size), torch.randn(2, 4, *size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("ndim", [2, 3])
def test_start_of_the_recurrent_update(ndim: int) -> None:
    torch.manual_seed(0)
    update = RecurrentUpdate(ndim)
    assert update.hidden_channels == 32 and RecurrentUpdate(ndim, hidden_size=3).hidden_channels == 6
    weight = update.unet.first_conv.weight
    assert not weight[:, :ndim].any() and bool((weight[:, ndim:] != 0).all())  # type: ignore[index]
    assert update.flow.weight.std().item() == pytest.approx(1e-5, rel=0.15) and not update.flow.bias.any()
    # the U-Net's last layer gives features here: He-normal like the others
    features = update.unet.flow.weight
    assert features.std().item() == pytest.approx((2 / (1.04 * 32 * 3**ndim)) ** 0.5, rel=0.05)
    size = (9, 7, 5)[:ndim]
    moving, fixed = torch.rand(2, 2, 1, *size)
    delta, hidden = update(moving, fixed, torch.zeros(2, ndim, *size), torch.zeros(2, 32, *size))
    assert 0 < delta.abs().max() < 1e-3 and hidden.shape == (2, 32, *size)
    assert hidden.abs().max() > 1e-2  # the images are seen from the first step


@pytest.mark.parametrize("size", SIZES)
def test_what_the_layers_of_riir_see(size: tuple[int, ...]) -> None:
    moving, fixed, ddf, hidden = recurrent_problem(size)
    update = seen_recurrent_update(len(size))
    seen = []
    update.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    delta, after = update(moving, fixed, ddf, hidden)

    slot, warp = ddf.clone().requires_grad_(), Warp()
    warped = warp(moving, slot)
    # a mean over N elements, times N
    (gradient,) = torch.autograd.grad((warped - fixed).square().sum(), slot)
    assert len(seen) == 1 and all(n % 2 == 0 for n in seen[0].shape[2:])
    x = seen[0][(..., *(slice(n) for n in size))]
    torch.testing.assert_close(x, torch.cat([ddf, gradient, warped, fixed], dim=1), rtol=0, atol=1e-12)

    with torch.no_grad():
        features = update.unet(seen[0])[(..., *(slice(n) for n in size))]
        features = torch.where(features > 0, features, 0.2 * features)
        first = update.first(features, hidden[:, :2])
        second = update.second(first, hidden[:, 2:])
        torch.testing.assert_close(after, torch.cat([first, second], dim=1), rtol=0, atol=1e-12)
        torch.testing.assert_close(delta, update.flow(second), rtol=0, atol=1e-12)
    assert delta.std() > 0.05


@pytest.mark.parametrize("size", SIZES)
def test_hidden_state_of_the_recurrent_update(size: tuple[int, ...]) -> None:
    moving, fixed, ddf, hidden = recurrent_problem(size)
    update = seen_recurrent_update(len(size))
    with torch.no_grad():
        delta, after = update(moving, fixed, ddf, hidden)
        assert after.shape == hidden.shape and not torch.equal(after, hidden)
        for channel in range(4):
            other = hidden.clone()
            other[:, channel] += 0.5
            assert (update(moving, fixed, ddf, other)[0] - delta).abs().max() > 1e-4
        for i in range(2):
            one = slice(i, i + 1)
            alone = update(moving[one], fixed[one], ddf[one], hidden[one])
            torch.testing.assert_close(alone[0], delta[one], rtol=0, atol=1e-12)
            torch.testing.assert_close(alone[1], after[one], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(3, 5), (2, 3, 4)])
@pytest.mark.parametrize("kind", range(3))
def test_gradient_of_the_recurrent_update(size: tuple[int, ...], kind: int) -> None:
    update = seen_recurrent_update(len(size), losses(len(size))[kind])
    assert_differentiable(update, list(recurrent_problem(size)))


def test_gradient_of_the_recurrent_update_entry_by_entry() -> None:
    moving, fixed, ddf, hidden = (t.requires_grad_() for t in recurrent_problem((2, 3)))
    update = seen_recurrent_update(2)
    assert torch.autograd.gradcheck(lambda u, h: update(moving.detach(), fixed.detach(), u, h), (ddf, hidden))


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_recurrent_update_in_half_precision(size: tuple[int, ...], around: bool) -> None:
    inputs = [t.float() for t in recurrent_problem(size)]
    update = seen_recurrent_update(len(size), autocast_dtype=None if around else "bfloat16").float()
    kinds = []
    for module in (update.unet, update.first.gates, update.second.candidate, update.flow):
        module.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        delta, hidden = update(*inputs)
    assert kinds == [torch.bfloat16] * 4
    assert delta.dtype == hidden.dtype == torch.float32
    for value, expected in zip((delta, hidden), seen_recurrent_update(len(size)).float()(*inputs), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0.03 * float(expected.detach().abs().max()))
        assert not torch.equal(value, expected)
    assert not torch.equal(hidden, hidden.bfloat16().float())  # the state itself is not rounded


def test_wrong_hidden_states() -> None:
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        RecurrentUpdate(2, hidden_size=0)
    moving, fixed, ddf, hidden = recurrent_problem((4, 6))
    for wrong in (hidden[:, :2], hidden[:1], hidden[..., :5]):
        with pytest.raises(ValueError, match=r"hidden must have shape \(2, 4, 4, 6\)"):
            seen_recurrent_update(2)(moving, fixed, ddf, wrong)


# --- VoxelMorphUpdate -------------------------------------------------------------------------------------------------


def monai_unet(ndim: int) -> VoxelMorphUNet:
    return VoxelMorphUNet(
        spatial_dims=ndim,
        in_channels=2,
        unet_out_channels=32,
        channels=(16, 32, 32, 32, 32, 32, 32, 32),
        final_conv_channels=(16, 16),
    )


def tiny_voxelmorph_update(ndim: int, integration_steps: int = 0) -> VoxelMorphUpdate:
    torch.manual_seed(0)
    update = VoxelMorphUpdate(ndim, integration_steps)
    update.backbone = RegistrationCNN(ndim, 2, channels=(4,), flow_std=0.2)  # type: ignore[assignment]
    return update.double()


@pytest.mark.parametrize("ndim", [2, 3])
def test_weights_of_voxelmorph(ndim: int) -> None:
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
    moving, fixed = pair((16, 16, 16)[:ndim], dtype=torch.float64)
    delta = update.double()(moving, fixed, torch.zeros(2, ndim, *moving.shape[2:], dtype=torch.float64))
    assert 0 < delta.abs().max() < 1e-3


@pytest.mark.parametrize(
    ("size", "integration_steps"), [((16, 32), 0), ((32, 48), 7), ((16, 16, 16), 0), ((16, 16, 16), 3)]
)
def test_one_step_of_voxelmorph_is_that_of_monai(size: tuple[int, ...], integration_steps: int) -> None:
    torch.manual_seed(0)
    ndim = len(size)
    theirs = VoxelMorph(monai_unet(ndim), integration_steps, spatial_dims=ndim).double().eval()
    update = VoxelMorphUpdate(ndim, integration_steps).double()
    update.backbone.load_state_dict(theirs.backbone.state_dict())
    net = UnrolledRegistrationNet(update, steps=1).eval()
    moving, fixed = pair(size, dtype=torch.float64)
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
def test_voxelmorph_update_at_any_size(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    moving, fixed = pair(size, dtype=torch.float64)
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
    moving, fixed = pair(size, dtype=torch.float64)
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
    moving, fixed = pair(size, dtype=torch.float64)
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
def test_gradient_of_the_voxelmorph_update(size: tuple[int, ...], integration_steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ddf = 0.2 + 0.6 * torch.rand(2, len(size), *size, dtype=torch.float64, generator=generator)
    update = tiny_voxelmorph_update(len(size), integration_steps)
    assert_differentiable(update, [*pair(size, dtype=torch.float64), ddf])


@pytest.mark.parametrize("integration_steps", [0, 3])
@pytest.mark.parametrize("around", [False, True])
def test_voxelmorph_update_in_half_precision(integration_steps: int, around: bool) -> None:
    moving, fixed = pair((20, 9))
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


def test_wrong_integration_steps() -> None:
    with pytest.raises(ValueError, match="integration_steps must not be negative, got -1"):
        VoxelMorphUpdate(2, -1)


def exported(ndim: int) -> dict[str, RegistrationUpdate]:
    """Updates with weights that are seen, in two classes of how they are computed: with a gradient inside, and not."""
    lncc = LocalNormalizedCrossCorrelationLoss(spatial_dims=ndim, kernel_size=3)
    backbone = RegistrationCNN(ndim, 2 + ndim, channels=(3,), flow_std=0.05)
    updates = {
        "UNet": tiny_update(ndim),
        "UNet of GraDIRN": UNetUpdate(ndim, backbone),
        "VoxelMorph": VoxelMorphUpdate(ndim, integration_steps=2, flow_std=0.02),
        "GraDIRN": GradientUpdate(ndim, lncc, 0.3, backbone),
        "RIIR": tiny_recurrent_update(ndim),
    }
    return {name: update.eval() for name, update in updates.items()}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", ["UNet", "UNet of GraDIRN", "VoxelMorph", "GraDIRN", "RIIR"])
def test_export(name: str, ndim: int, grad: bool) -> None:
    update, size = exported(ndim)[name], (17, 16, 18)[-ndim:]

    def arguments(seed: int) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(seed)
        ddf, hidden = torch.randn(1, ndim, *size), torch.randn(1, update.hidden_channels, *size)
        return (*pair(size, batch=1, seed=seed), ddf, *([hidden] if update.hidden_channels else []))

    with torch.set_grad_enabled(grad):
        program = torch.export.export(update, arguments(1)).module()
        # other images than those it was traced with
        for seed in (1, 2):
            given = arguments(seed)
            expected, got = update(*given), program(*given)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            delta = expected[0] if isinstance(expected, tuple) else expected
            assert float(delta.detach().abs().max()) > 1e-3


@pytest.mark.parametrize("ndim", [2, 3])
def test_export_for_batches_of_any_size(ndim: int) -> None:
    update, size = tiny_update(ndim).eval(), (16, 12, 10)[:ndim]
    given = [(*pair(size, batch, seed=batch), torch.randn(batch, ndim, *size)) for batch in (2, 3, 7)]
    batch = torch.export.Dim("batch", min=2, max=16)
    with torch.no_grad():
        program = torch.export.export(update, given[0], dynamic_shapes=({0: batch},) * 3).module()
        for arguments in given:
            torch.testing.assert_close(program(*arguments), update(*arguments), rtol=1e-5, atol=1e-5)
