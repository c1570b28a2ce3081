# SPDX-License-Identifier: Apache-2.0
"""The recurrent update: what its layers see, its hidden state, half precision, gradients of the second order."""

from __future__ import annotations

import pytest
import torch
from monai.losses import GlobalMutualInformationLoss, LocalNormalizedCrossCorrelationLoss
from monai.networks.blocks import Warp
from torch.func import functional_call

from monai_deq.networks.blocks import RecurrentUpdate, RegistrationUNet

SIZES = [(5, 7), (4, 3, 6)]


def losses(ndim: int) -> list[torch.nn.Module]:
    return [
        torch.nn.MSELoss(),
        LocalNormalizedCrossCorrelationLoss(spatial_dims=ndim, kernel_size=3),
        GlobalMutualInformationLoss(num_bins=6),
    ]


def tiny_update(ndim: int, similarity: torch.nn.Module | None = None, autocast: str | None = None) -> RecurrentUpdate:
    """Hidden states of 2 channels each, a U-Net of one level, weights that are seen."""
    torch.manual_seed(0)
    update = RecurrentUpdate(ndim, similarity, hidden_size=2, flow_std=0.3, autocast_dtype=autocast)
    update.unet = RegistrationUNet(ndim, 2 * ndim + 2, 2, (2, 2), (2,), (), flow_std=0.3)
    return update.double()


def problem(size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random images, displacements that sample between the kinks of linear interpolation, a hidden state."""
    generator = torch.Generator().manual_seed(sum(size))
    moving, fixed = 0.1 + 0.8 * torch.rand(2, 2, 1, *size, dtype=torch.float64, generator=generator)
    whole = torch.randint(-1, 2, (2, len(size), *size), generator=generator)
    ddf = whole + 0.2 + 0.6 * torch.rand(whole.shape, dtype=torch.float64, generator=generator)
    return moving, fixed, ddf, torch.randn(2, 4, *size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("ndim", [2, 3])
def test_start(ndim: int) -> None:
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
def test_what_its_layers_see(size: tuple[int, ...]) -> None:
    moving, fixed, ddf, hidden = problem(size)
    update = tiny_update(len(size))
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
def test_hidden_state(size: tuple[int, ...]) -> None:
    moving, fixed, ddf, hidden = problem(size)
    update = tiny_update(len(size))
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
def test_gradient(size: tuple[int, ...], kind: int) -> None:
    update = tiny_update(len(size), losses(len(size))[kind])
    names = [name for name, _ in update.named_parameters()]

    def f(*inputs: torch.Tensor) -> torch.Tensor:
        return functional_call(update, dict(zip(names, inputs[4:], strict=True)), inputs[:4])

    inputs = (*(t.requires_grad_() for t in problem(size)), *update.parameters())
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


def test_gradient_entry_by_entry() -> None:
    moving, fixed, ddf, hidden = (t.requires_grad_() for t in problem((2, 3)))
    update = tiny_update(2)
    assert torch.autograd.gradcheck(lambda u, h: update(moving.detach(), fixed.detach(), u, h), (ddf, hidden))


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_half_precision(size: tuple[int, ...], around: bool) -> None:
    inputs = [t.float() for t in problem(size)]
    update = tiny_update(len(size), autocast=None if around else "bfloat16").float()
    kinds = []
    for module in (update.unet, update.first.gates, update.second.candidate, update.flow):
        module.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        delta, hidden = update(*inputs)
    assert kinds == [torch.bfloat16] * 4
    assert delta.dtype == hidden.dtype == torch.float32
    for value, expected in zip((delta, hidden), tiny_update(len(size)).float()(*inputs), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0.03 * float(expected.detach().abs().max()))
        assert not torch.equal(value, expected)
    assert not torch.equal(hidden, hidden.bfloat16().float())  # the state itself is not rounded


def test_errors() -> None:
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3, got 1"):
        RecurrentUpdate(1)
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        RecurrentUpdate(2, hidden_size=0)
    with pytest.raises(ValueError, match="autocast_dtype must be .*, got 'half'"):
        RecurrentUpdate(2, autocast_dtype="half")
    moving, fixed, ddf, hidden = problem((4, 6))
    for wrong in (hidden[:, :2], hidden[:1], hidden[..., :5]):
        with pytest.raises(ValueError, match=r"hidden must have shape \(2, 4, 4, 6\)"):
            tiny_update(2)(moving, fixed, ddf, wrong)
