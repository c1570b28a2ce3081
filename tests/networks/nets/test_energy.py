# SPDX-License-Identifier: Apache-2.0
"""Registration by the energy: known deformations, symmetries, where it comes to rest, and what its record says."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiffusionLoss, LocalNormalizedCrossCorrelationLoss
from nets import Pull, deq_net

from monai_deq.certificates import certified_solve
from monai_deq.metrics import compute_folded_voxels, compute_non_diffeomorphic_volume
from monai_deq.networks import build_component, describe
from monai_deq.networks.blocks import (
    DiffusionFoldLoss,
    EnergyUpdate,
    FeatureLoss,
    LocalCorrelationLoss,
    gaussian_smooth,
    warp_by_ddf,
)
from monai_deq.networks.nets import EnergyRegistrationNet, FeatureUNet, energy_finish
from monai_deq.solvers import MEASURES, SolverSettings, random_smooth_ddf

SIZES = [(40, 33), (32, 30, 28)]


def image(size: tuple[int, ...], seed: int = 0, batch: int = 1) -> torch.Tensor:
    """Smooth, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    smooth = gaussian_smooth(torch.rand(batch, 1, *size, generator=generator) - 0.5, 2.0)
    low, high = (getattr(smooth.flatten(1), f)(1).view(-1, *[1] * (smooth.ndim - 1)) for f in ("amin", "amax"))
    return (smooth - low) / (high - low)


def problem(
    size: tuple[int, ...], rms: float = 1.5, seed: int = 0, batch: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pair, and the displacement between the two."""
    moving = image(size, seed, batch)
    truth = random_smooth_ddf((batch, len(size), *size), rms, 6.0, seed)
    return moving, warp_by_ddf(moving, truth), truth


def length(ddf: torch.Tensor) -> float:
    """RMS over voxels, in voxels."""
    return float(ddf.square().sum(dim=1).mean().sqrt())


def make_net(ndim: int, **kwargs: Any) -> EnergyRegistrationNet:
    return EnergyRegistrationNet(spatial_dims=ndim, **kwargs).eval()


# --- known deformations and symmetries --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", [*SIZES, (41, 64)])
def test_known_deformations(size: tuple[int, ...], seed: int) -> None:
    moving, fixed, truth = problem(size, seed=seed)
    warped, ddf = make_net(len(size))(moving, fixed)
    assert length(ddf - truth) < 0.25 * length(truth)
    assert float((warped - fixed).square().mean().sqrt()) < 0.2 * float((moving - fixed).square().mean().sqrt())
    torch.testing.assert_close(warped, warp_by_ddf(moving, ddf), rtol=0, atol=1e-6)
    assert not compute_folded_voxels(ddf).any() and not compute_non_diffeomorphic_volume(ddf).any()
    assert torch.equal(make_net(len(size))(torch.cat([moving, fixed], dim=1)), ddf)


@pytest.mark.parametrize("size", [(5, 9), (8, 8), (9, 13), (10, 9, 8)])
def test_images_too_small_for_all_sizes(size: tuple[int, ...]) -> None:
    moving, fixed, truth = problem(size, 0.7)
    ddf, record = make_net(len(size), steps=(60, 40, 40)).solve(moving, fixed)
    assert [int(n) for n in record.coarse_steps] == [0, 0]
    assert int(record.steps) <= 40 and length(ddf - truth) < 0.35 * length(truth)


@pytest.mark.parametrize(("size", "levels"), [((14, 40), 1), ((15, 40), 2), ((31, 28), 2), ((29, 33), 3)])
def test_sizes(size: tuple[int, ...], levels: int) -> None:
    # none has an axis of fewer than eight voxels
    moving, fixed, _ = problem(size)
    _, record = make_net(2, steps=(3, 4, 5), tolerance=0.0).solve(moving, fixed)
    assert [int(record.steps), *(int(n) for n in record.coarse_steps)] == [[5, 4, 3], [5, 4, 0], [5, 0, 0]][3 - levels]
    _, record = make_net(2, steps=(3, 4, 5), tolerance=0.0).solve(moving, fixed, max_steps=7)
    assert [int(record.steps), *(int(n) for n in record.coarse_steps)] == [[7, 4, 3], [7, 4, 0], [7, 0, 0]][3 - levels]


def test_default_steps() -> None:
    assert make_net(3).steps == (60, 40, 6) and make_net(2).steps == (60, 60, 40)
    assert make_net(3).solver == SolverSettings(max_steps=6, tolerance=1e-3)
    assert EnergyRegistrationNet(EnergyUpdate(2)).spatial_dims == 2


@pytest.mark.parametrize("size", [(40, 32), (16, 20, 24), (7, 12)])
def test_axes_are_alike(size: tuple[int, ...]) -> None:
    # sizes that halve evenly: where a last odd voxel stands alone, the one end of an axis is not like the other
    ndim = len(size)
    moving, fixed, _ = problem(size, 1.0)
    net = make_net(ndim, steps=(20, 20, 10))
    expected = net(moving, fixed)[1]
    for axis in range(ndim):
        sign = torch.ones(1, ndim, *[1] * ndim)
        sign[:, axis] = -1
        flipped = net(moving.flip(2 + axis), fixed.flip(2 + axis))[1]
        assert length(sign * flipped.flip(2 + axis) - expected) < 1e-3
    order = list(range(ndim))[::-1]
    axes = [0, 1, *(2 + i for i in order)]
    turned = net(moving.permute(axes), fixed.permute(axes))[1]
    assert length(turned[:, order].permute(axes) - expected) < 1e-3
    assert length(expected) > 0.5


def test_odd_sizes_are_nearly_alike() -> None:
    moving, fixed, _ = problem((40, 33))
    net = make_net(2)
    expected, flipped = net(moving, fixed)[1], net(moving.flip(3), fixed.flip(3))[1]
    assert length(flipped.flip(3) * torch.tensor([1.0, -1]).view(1, 2, 1, 1) - expected) < 0.05


@pytest.mark.parametrize("size", [(40, 33), (16, 20, 17)])
def test_brightness_and_contrast_do_not_matter(size: tuple[int, ...]) -> None:
    moving, fixed, _ = problem(size)
    net = make_net(len(size), steps=(20, 20, 10))
    expected = net(moving, fixed)[1]
    for scale, offset in ((0.3, 0.4), (2000.0, -1000.0)):
        assert length(net(scale * moving + offset, fixed)[1] - expected) < 1e-2
        assert length(net(moving, scale * fixed + offset)[1] - expected) < 1e-2


@pytest.mark.parametrize(("size", "shifts"), [((40, 33), {4: 0.08, 1: 0.12}), ((24, 23, 22), {4: 0.3})])
def test_place_inside_a_border_hardly_matters(size: tuple[int, ...], shifts: dict[int, float]) -> None:
    moving, fixed, _ = problem(size)
    ndim = len(size)

    def run(shift: int) -> torch.Tensor:
        border = [8 + (shift if k % 2 == 0 else -shift) for k in range(2 * ndim)]
        ddf = make_net(ndim)(F.pad(moving, border), F.pad(fixed, border))[1]
        return ddf[(..., *(slice(8 + shift, 8 + shift + n) for n in size))]

    expected = run(0)
    assert length(expected) > 1
    for shift, most in shifts.items():
        assert length(run(shift) - expected) < most


@pytest.mark.parametrize("size", SIZES)
def test_swapped_images_give_nearly_the_inverse(size: tuple[int, ...]) -> None:
    moving, fixed, _ = problem(size)
    net = make_net(len(size))
    there, back = net(moving, fixed)[1], net(fixed, moving)[1]
    for one, other in ((there, back), (back, there)):
        assert length(one + warp_by_ddf(other, one)) < 0.25 * length(one)


@pytest.mark.parametrize("size", [(33, 40), (17, 16, 18), (5, 9)])
def test_equal_images(size: tuple[int, ...]) -> None:
    sharp = image(size)
    dark = torch.where(sharp > 0.5, sharp, 0.0)
    faint = dark + 1e-3 * torch.rand(sharp.shape, generator=torch.Generator().manual_seed(1))
    for same in (sharp, dark, faint, torch.zeros_like(sharp), torch.full_like(sharp, 0.4)):
        ddf, record = make_net(len(size)).solve(same, same.clone())
        assert not ddf.any() and not record.residual.any()
        # of a few voxels the share of the averages that is filled is noticed
        assert bool(record.converged) or same[0].numel() < 100


def test_one_image_without_contrast() -> None:
    constant = torch.full((1, 1, 20, 17), 0.5)
    for moving, fixed in ((constant, image((20, 17))), (image((20, 17)), constant)):
        assert not make_net(2)(moving, fixed)[1].any()


def test_anisotropic_voxels() -> None:
    # every other row of the same pair: with the spacing the same displacement, half of it in voxels of the rows
    moving, fixed, truth = problem((80, 40), 2.0)
    rows = (slice(None), slice(None), slice(None, None, 2))
    scale = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1)
    net = EnergyRegistrationNet(EnergyUpdate(2, spacing=(2.0, 1.0))).eval()
    ddf = net(moving[rows], fixed[rows])[1] * scale
    assert length(ddf - truth[rows]) < 0.25 * length(truth)
    assert length(ddf - make_net(2)(moving, fixed)[1][rows]) < 0.25 * length(truth)


# --- where it comes to rest -------------------------------------------------------------------------------------------


def energy_by_hand(moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, weight: float) -> float:
    """Of one pair with mean squared differences as similarity."""
    u = ddf.double().numpy()
    rough = sum(np.square(np.diff(u, axis=axis)).sum() for axis in range(2, u.ndim)) / u.size
    return float((warp_by_ddf(moving, ddf) - fixed).double().square().mean()) + weight * rough


@pytest.mark.parametrize("size", [(24, 22), (12, 13, 11)])
def test_energies_of_the_record(size: tuple[int, ...]) -> None:
    moving, fixed, _ = problem(size, 1.0)
    update = EnergyUpdate(len(size), torch.nn.MSELoss(), 0.002)
    net = EnergyRegistrationNet(update, steps=(20,), tolerance=0.0, least_jacobian=None).eval()
    record = net.solve(moving, fixed)[1]
    assert set(record.measures) == {"energy", "slope"}
    energy, slope = (record.measures[name][0] for name in ("energy", "slope"))
    assert energy.shape == slope.shape == (20,)
    for n in (1, 7, 19):
        ddf, _ = net.solve(moving, fixed, max_steps=n)
        assert float(energy[n]) == pytest.approx(energy_by_hand(moving, fixed, ddf, 0.002), rel=1e-4)
    assert float(energy[0]) == pytest.approx(float((moving - fixed).square().mean()), rel=1e-5)
    assert energy[-1] < 0.4 * energy[0] and slope[-1] < 0.5 * slope[0]


@pytest.mark.parametrize(("size", "seed"), [((40, 33), 0), ((16, 14, 15), 0), ((9, 13), 1)])
def test_comes_to_rest(size: tuple[int, ...], seed: int) -> None:
    ndim = len(size)
    moving, fixed, _ = problem(size, 1.5 if min(size) > 9 else 0.7, seed)
    net = make_net(ndim, steps=(60, 60, 400))
    ddf, record = net.solve(moving, fixed)
    steps = int(record.steps)
    assert bool(record.converged) and record.reason == ("tolerance",) and 20 < steps < 200
    assert float(record.final_residual) <= 1e-3
    energy = record.measures["energy"][0, :steps]
    # down, and at the end no higher than the lowest there was
    assert energy[-1] < energy[0] - 1e-3 and float(energy[-1] - energy.min()) < 2e-5
    # a step later nearly the same; the residuals of the steps waver
    certificates = certified_solve(net, moving, fixed, certificate={"tolerance": 3e-3})[2]
    assert certificates is not None and certificates[0].verdict == "converged" and certificates[0].residual < 2e-3
    assert certificates[0].steps == steps
    # and it goes nowhere from there
    later, record = net.solve(moving, fixed, max_steps=steps + (1000 if max(size) < 14 else 60), tolerance=0.0)
    assert length(later - ddf) < 0.02
    assert float(record.measures["energy"][0].min()) > float(energy.min()) - 1e-4


def test_certificate_with_nothing_asked_for() -> None:
    moving, fixed, _ = problem((40, 33), seed=1)
    _, record, certificates = certified_solve(make_net(2, steps=(60, 60, 400)), moving, fixed, certificate={})
    assert certificates is not None and certificates[0].verdict == "converged"
    # three steps: it is still falling
    _, record, certificates = certified_solve(make_net(2, steps=(60, 60, 3)), moving, fixed, certificate={})
    assert certificates is not None and certificates[0].verdict == "step limit" == record.reason[0]


def test_items_stop_one_by_one() -> None:
    moving, fixed, _ = problem((20, 17), 1.0, batch=3)
    fixed[1] = moving[1]
    fixed[2, 0, 3, 3] = float("nan")
    net = make_net(2, steps=(60, 300))
    ddf, record = net.solve(moving, fixed)
    assert record.reason == ("tolerance", "tolerance", "non-finite") and record.steps[0] > 20 > record.steps[1]
    assert record.steps[2] == 0 and not ddf[1:].any()
    for i in range(2):
        alone, other = net.solve(moving[i : i + 1], fixed[i : i + 1])
        torch.testing.assert_close(alone[0], ddf[i], rtol=0, atol=1e-4)
        n = int(record.steps[i])
        assert abs(int(other.steps) - n) <= 1
        for values in record.measures.values():
            assert values.ndim == 1 or bool(values[i, n:].isnan().all())
        assert bool(record.measures["energy"][i, :n].isfinite().all())
    words = record.item(2)
    assert len(words["energy_trace"]) == 0 and words["unfolded"] == 0
    assert record.item(1)["steps"] == len(record.item(1)["energy_trace"])


# --- folds, masks, starts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 33), (16, 18, 15)])
def test_folds_are_removed(size: tuple[int, ...]) -> None:
    # images that have nothing to do with each other, next to no smoothness
    ndim = len(size)
    moving, fixed = image(size, 1), image(size, 2)
    update = EnergyUpdate(ndim, weight=1e-3, sigma=0.7)
    folded, record = EnergyRegistrationNet(update, steps=(30, 20), least_jacobian=None).eval().solve(moving, fixed)
    assert compute_non_diffeomorphic_volume(folded) > 0 and "unfolded" not in record.measures
    ddf, record = EnergyRegistrationNet(update, steps=(30, 20)).eval().solve(moving, fixed)
    assert not compute_non_diffeomorphic_volume(ddf).any() and not compute_folded_voxels(ddf).any()
    values = record.measured()
    assert set(values) == set(MEASURES) - {"finish_steps", "energy_before_finish"}
    assert 0 < int(values["unfolded"]) < ddf[0, 0].numel() and length(ddf) > 0.5
    hidden = update(moving, fixed, ddf, torch.zeros(1, update.hidden_channels, *size))[1]
    torch.testing.assert_close(values["energy_unfolded"], update.measured(hidden)[0], rtol=1e-5, atol=0)
    assert values["energy_before_unfolding"] < values["energy_unfolded"]
    # nothing to remove costs nothing
    moving, fixed, _ = problem(size, 0.5)
    values = make_net(ndim).solve(moving, fixed)[1].measured()
    assert values["unfolded"] == 0 and values["energy_before_unfolding"].isnan() and values["energy_unfolded"].isnan()


@pytest.mark.parametrize("size", [(40, 33), (16, 18, 15)])
def test_an_equilibrium_without_folds(size: tuple[int, ...]) -> None:
    moving, fixed = image(size, 1), image(size, 2)
    folded = list[float]()
    for smoothness in (None, DiffusionFoldLoss()):
        update = EnergyUpdate(len(size), weight=0.02, smoothness=smoothness, sigma=1.0)
        net = EnergyRegistrationNet(update, steps=(60, 400), tolerance=0.005, least_jacobian=None).eval()
        again = build_component(describe(net))  # as a checkpoint's record has it
        ddf, record, certificates = certified_solve(again, moving, fixed, certificate={"tolerance": 0.02})
        assert bool(record.converged) and certificates is not None and certificates[0].verdict == "converged"
        assert length(ddf) > 0.5
        folded.append(float(compute_folded_voxels(ddf)))
    assert folded[0] > 0.5 and folded[1] < 0.1 * folded[0]


def test_mask_of_the_fixed_image() -> None:
    moving, fixed, truth = problem((40, 33))
    net = make_net(2, steps=(30, 30, 20))
    mask = torch.ones_like(fixed)
    mask[..., 20:] = 0
    # beyond the mask there is something else
    broken = torch.where(mask > 0, fixed, image((40, 33), 7))
    seen = (..., slice(0, 18))
    error = length((net.solve(moving, broken, mask=mask)[0] - truth)[seen])
    assert error < 0.3 * length(truth[seen])
    assert error < 0.8 * length((net.solve(moving, broken)[0] - truth)[seen])
    # everywhere is nowhere else
    everywhere = net.solve(moving, fixed, mask=torch.ones_like(fixed))[0]
    torch.testing.assert_close(everywhere, net(moving, fixed)[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(net(moving, broken, mask=mask)[1], net.solve(moving, broken, mask=mask)[0])


def test_initial_displacement() -> None:
    moving, fixed, truth = problem((40, 33))
    net = make_net(2)
    ddf, record = net.solve(moving, fixed, truth, max_steps=1)
    assert not any(record.coarse_steps) and length(ddf - truth) <= 0.51
    assert float(record.measures["energy"][0, 0]) < -0.9
    ddf, record = net.solve(moving, fixed, truth)
    assert length(ddf - truth) < 0.25 * length(truth) and int(record.steps) <= 40
    with pytest.raises(ValueError, match="ddf must have shape"):
        net.solve(moving, fixed, truth[:, :1])


def test_result_has_no_hidden_state_and_no_gradient() -> None:
    moving, fixed, _ = problem((20, 17))
    net = make_net(2)
    ddf, _ = net.solve(moving.requires_grad_(), fixed)
    assert ddf.untyped_storage().nbytes() == ddf.numel() * 4 and not ddf.requires_grad
    assert net.solve_state(moving, fixed)[0].shape == (1, 6, 20, 17)


@pytest.mark.parametrize("similarity", [torch.nn.MSELoss(), LocalNormalizedCrossCorrelationLoss(2, 5)])
def test_other_similarities_and_inference_mode(similarity: torch.nn.Module) -> None:
    moving, fixed, truth = problem((40, 33), 1.0)
    weight = 0.002 if isinstance(similarity, torch.nn.MSELoss) else 0.1
    net = EnergyRegistrationNet(EnergyUpdate(2, similarity, weight, DiffusionLoss())).eval()
    ddf = net(moving, fixed)[1]
    assert length(ddf - truth) < 0.45 * length(truth)
    with torch.inference_mode():
        torch.testing.assert_close(net(moving.clone(), fixed.clone())[1].clone(), ddf, rtol=0, atol=1e-5)


# --- as a part of other things ----------------------------------------------------------------------------------------


NETWORKS = {
    "default": lambda: EnergyRegistrationNet(spatial_dims=2),
    "settings": lambda: EnergyRegistrationNet(
        EnergyUpdate(2, LocalCorrelationLoss(5, 0.01), 0.7, None, 2.0, 0.25, (2.0, 1.0)), 2, [7, 9], 0.01, None
    ),
    "losses": lambda: EnergyRegistrationNet(
        EnergyUpdate(2, LocalNormalizedCrossCorrelationLoss(2, 5), 0.7, DiffusionLoss()), steps=(3, 4)
    ),
}


@pytest.mark.filterwarnings("ignore:Using a non-tuple")
@pytest.mark.parametrize("name", NETWORKS)
def test_described_built_and_pickled(name: str) -> None:
    net = NETWORKS[name]().eval()
    moving, fixed, _ = problem((20, 18))
    expected = net(moving, fixed)[1]
    description = describe(net)
    assert description["_target_"] == "monai_deq.networks.nets.EnergyRegistrationNet"
    again = build_component(description).eval()
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (again, loaded, pickle.loads(pickle.dumps(net))):
        assert describe(other) == description and torch.equal(other(moving, fixed)[1], expected)
        assert (other.steps, other.tolerance, other.least_jacobian) == (net.steps, net.tolerance, net.least_jacobian)
    assert not net.state_dict()


def test_nothing_to_train() -> None:
    moving, fixed, _ = problem((20, 18))
    with pytest.raises(NotImplementedError, match="EnergyRegistrationNet has nothing to train"):
        make_net(2).train()(moving, fixed)


def test_finish() -> None:
    assert energy_finish(2, 0) is None
    finish = energy_finish(2, 7, 0.3)
    assert finish is not None and not finish.training and finish.steps == (7,)
    assert finish.update.weight == 0.3 and finish.spatial_dims == 2
    default = energy_finish()
    assert default is not None and default.steps == (40,) and default.update.weight == 0.4
    assert default.spatial_dims == 3


@pytest.mark.parametrize("certificate", [None, {}])
def test_both_results_of_a_finish(certificate: Any) -> None:
    moving, fixed, _ = problem((24, 20), batch=2)
    first = deq_net(Pull(), num_states=0, max_steps=3).eval()
    finish = EnergyRegistrationNet(EnergyUpdate(2), steps=(6,)).eval()
    plain, said, certificates = certified_solve(first, moving, fixed, None, certificate, max_steps=4)
    ddf, record, others = certified_solve(first, moving, fixed, None, certificate, finish, max_steps=4)
    expected, finished = finish.solve(moving, fixed, plain)
    assert torch.equal(ddf, expected) and not torch.equal(ddf, plain) and not ddf.requires_grad
    # all else is of the first solution
    assert torch.equal(record.steps, said.steps) and torch.equal(record.residual, said.residual)
    assert record.measures == {} and others == certificates and said.finish is None
    assert record.finish is not None and record.finish.steps.tolist() == [6, 6]
    torch.testing.assert_close(record.finish.measures["energy"], finished.measures["energy"], rtol=0, atol=0)
    values = record.measured()
    assert set(values) == set(MEASURES)
    hidden = finish.update(moving, fixed, plain, torch.zeros(2, 4, 24, 20))[1]
    torch.testing.assert_close(values["energy_before_finish"], finish.update.measured(hidden)[0])
    assert bool((values["energy"] < values["energy_before_finish"] - 0.01).all())
    assert torch.equal(values["energy"], finished.measures["energy"][:, -1])


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
        ({"steps": ()}, r"steps must be a whole number of at least 1 for each size, got \(\)"),
        ({"steps": (3, 0)}, r"at least 1 for each size, got \(3, 0\)"),
        ({"steps": (1.5,)}, r"at least 1 for each size, got \(1.5,\)"),
        ({"least_jacobian": -0.1}, r"least_jacobian must be None or in \[0, 1\), got -0.1"),
        ({"least_jacobian": 1.0}, r"least_jacobian must be None or in \[0, 1\), got 1.0"),
        ({"tolerance": -1.0}, "tolerance must not be negative, got -1.0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EnergyRegistrationNet(**{"spatial_dims": 2, **arguments})


def test_wrong_images() -> None:
    moving, fixed, _ = problem((20, 18))
    net = make_net(2)
    with pytest.raises(ValueError, match=r"mask must have the shape of fixed, \(1, 1, 20, 18\), got \(1, 1, 18, 20\)"):
        net.fixed_point_map(moving, fixed, torch.ones(1, 1, 18, 20))
    with pytest.raises(ValueError, match=r"mask must have the shape of fixed, \(1, 1, 20, 18\), got \(1, 20, 18\)"):
        net.solve(moving, fixed, mask=torch.ones(1, 20, 18))
    with pytest.raises(ValueError, match=r"the network is for 3-D images, got shape \(1, 1, 20, 18\)"):
        make_net(3).solve(moving, fixed)
    with pytest.raises(ValueError, match="must have the same shape"):
        net.solve(moving, fixed[..., :-1])
    with pytest.raises(ValueError, match="floating point"):
        net.solve(moving.byte(), fixed)
    with pytest.raises(TypeError, match="the solver has the settings .*, got max_step"):
        net.solve(moving, fixed, max_step=3)


class Powers(torch.nn.Module):
    """Two features with something to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([0.8, 1.3]))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.scale[0] * image, (self.scale[1] * image).square()], dim=1)


@pytest.mark.parametrize("size", SIZES)
def test_features_bring_what_the_image_does_not_show(size: tuple[int, ...]) -> None:
    """The images have no contrast; a feature, here another image, has."""
    moving, fixed, truth = problem(size)
    ndim = len(size)
    still = torch.full_like(fixed, 0.5)

    class Other(torch.nn.Module):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return moving if torch.equal(given, still) else fixed

    update = EnergyUpdate(ndim, FeatureLoss(20.0), weight=0.05)
    net = EnergyRegistrationNet(update, features=Other()).eval()
    other = still + 0.1
    ddf, record = net.solve(still, other)
    inside = (slice(None), slice(None), *(slice(5, -5) for _ in size))
    assert length((ddf - truth)[inside]) < 0.3 * length(truth[inside])
    assert length(EnergyRegistrationNet(spatial_dims=ndim).eval().solve(still, other)[0]) == 0
    assert record.measures["energy"].shape[0] == 1


def test_features_of_a_batch_are_recorded() -> None:
    moving, fixed, _ = problem((33, 40), batch=2)
    features = FeatureUNet(2, 3, (4, 4, 4, 8, 8, 4))
    net = EnergyRegistrationNet(EnergyUpdate(2, FeatureLoss(2.0)), steps=(4, 3), features=features).eval()
    rebuilt = build_component(describe(net)).eval()
    rebuilt.load_state_dict(net.state_dict())
    assert torch.equal(rebuilt.solve(moving, fixed)[0], net.solve(moving, fixed)[0])
    # nothing depends on the other pairs of the batch
    assert torch.allclose(net.solve(moving[1:], fixed[1:])[0], net.solve(moving, fixed)[0][1:], atol=1e-4)
    (certified,) = certified_solve(net, moving[:1], fixed[:1], certificate={})[-1]
    assert np.isfinite(certified.residual)


def supervised(ddf: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """A loss of labels, here of what is brighter than one half."""
    warped, target = warp_by_ddf((moving > 0.5).to(ddf), ddf), (fixed > 0.5).to(ddf)
    return 1 - 2 * (warped * target).sum() / (warped.sum() + target.sum())


def test_gradient_of_features_is_that_of_the_unrolled_descent() -> None:
    torch.manual_seed(0)
    places = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")

    def blob(y: float, x: float, r: float) -> torch.Tensor:
        return torch.exp(-((places[0] - y) ** 2 + (places[1] - x) ** 2) / (2 * r * r))[None, None].double()

    moving, fixed = blob(11, 9, 4) + 0.5 * blob(8, 16, 2), blob(12, 12, 4.5) + 0.5 * blob(11, 17, 2.5)
    conv = torch.nn.Conv2d
    features = torch.nn.Sequential(
        conv(1, 4, 5, padding=2), torch.nn.Tanh(), conv(4, 3, 5, padding=2), torch.nn.Softmax(1)
    ).double()
    weights = list(features.parameters())
    net = EnergyRegistrationNet(EnergyUpdate(2, FeatureLoss(3.0)), steps=(40, 300), tolerance=1e-9, features=features)
    net.least_jacobian = None

    def flat(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    # plain descent from the solution, which stays there, back-propagated through all steps
    with torch.no_grad():
        ddf, _ = net.solve(moving, fixed)
    start, (a, b) = ddf.clone(), (torch.cat([t, features(t)], dim=1) for t in (moving, fixed))
    gradient = net.update.gradient_at(a, b)
    for _ in range(400):
        ddf = ddf - 0.5 * gradient(ddf)
    assert float((ddf - start).detach().abs().max()) < 0.02
    unrolled = flat(supervised(ddf, moving, fixed))

    found = {}
    for steps in (1, 20):
        net.gradient_steps = steps
        _, ddf, states = net.train()(moving, fixed)
        assert states == [] and torch.equal(ddf, start)
        found[steps] = flat(supervised(ddf, moving, fixed))
    cosines = {n: float(F.cosine_similarity(g, unrolled, dim=0)) for n, g in found.items()}
    assert cosines[20] > 0.995 > cosines[1]
    assert 0.85 < float(found[20].norm() / unrolled.norm()) < 1.15 and found[1].norm() < 0.5 * unrolled.norm()


@pytest.mark.parametrize("size", [(33, 40), (16, 17, 18)])
def test_features_are_trained_item_by_item(size: tuple[int, ...]) -> None:
    moving, fixed, _ = problem(size, batch=2)
    torch.manual_seed(0)
    features = FeatureUNet(len(size), 3, (4, 4, 4, 8, 8, 4))
    update = EnergyUpdate(len(size), FeatureLoss(2.0))
    net = EnergyRegistrationNet(update, steps=(4, 3), features=features, gradient_steps=3).train()
    mask = torch.ones_like(fixed)
    mask[..., : size[-1] // 2] = 0

    def gradients(*given: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        features.zero_grad()
        warped, ddf, states = net(*given, **more)
        assert ddf.shape == (len(given[0]), len(size), *size) and states == []
        warped.square().flatten(1).mean(dim=1).sum().backward()
        return torch.cat([p.grad.flatten() for p in features.parameters()])  # type: ignore[union-attr]

    both = gradients(moving, fixed)
    alone = [gradients(moving[i : i + 1], fixed[i : i + 1]) for i in range(2)]
    assert torch.isfinite(both).all() and float((both - alone[0] - alone[1]).norm()) < 0.01 * float(both.norm())
    masked = gradients(moving, fixed, mask=mask)
    assert float((masked - both).norm()) > 0.1 * float(both.norm())


def test_training_keeps_nothing_of_the_steps() -> None:
    moving, fixed, _ = problem((24, 26))
    features = FeatureUNet(2, 3, (4, 4, 4, 8, 8, 4))

    def kept(steps: int) -> int:
        size = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += tensor.numel() * tensor.element_size()
            return tensor

        net = EnergyRegistrationNet(EnergyUpdate(2, FeatureLoss(2.0)), steps=(steps,), features=features).train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(moving, fixed)
        return size

    assert 0 < kept(10) == kept(100)


def test_features_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="FeatureLoss"):
        EnergyRegistrationNet(spatial_dims=2, features=Powers())
    with pytest.raises(ValueError, match="gradient_steps must be at least 1, got 0"):
        EnergyRegistrationNet(spatial_dims=2, gradient_steps=0)
    with pytest.raises(NotImplementedError, match="nothing to train"):
        EnergyRegistrationNet(spatial_dims=2).train()(image((12, 12)), image((12, 12), 1))
