# SPDX-License-Identifier: Apache-2.0
"""Certificates: spectral radii of known matrices, verdicts on known traces, distances between known solutions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d

from monai_deq.networks.blocks import RecurrentUpdate, RegistrationUNet, UNetUpdate
from monai_deq.networks.nets import DEQRegistrationNet, UnrolledRegistrationNet
from monai_deq.solvers import (
    Certificate,
    certified_solve,
    certify,
    check_certificate,
    random_smooth_ddf,
    residual_at,
    spectral_radius,
    verdict,
)

SIZES = {2: (7, 6), 3: (5, 4, 6)}


def rotation(radius: float, angle: float) -> np.ndarray:
    return radius * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def linear_map(matrices: list[np.ndarray], offset: float = 0.0) -> Callable[[torch.Tensor], torch.Tensor]:
    a = torch.from_numpy(np.stack(matrices))

    def g(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bij,bjn->bin", a.to(x.dtype), x) + offset

    return g


def test_spectral_radius_of_complex_pairs_and_of_each_item() -> None:
    # a Rayleigh quotient gives radius * cos(angle), 0 for the first
    matrices = [rotation(0.9, math.pi / 2), rotation(1.3, 2.0), rotation(0.25, 0.0)]
    radius = spectral_radius(linear_map(matrices), torch.zeros(3, 2, 5))
    torch.testing.assert_close(radius, torch.tensor([0.9, 1.3, 0.25], dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_spectral_radius_of_random_matrices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrices = [rng.standard_normal((12, 12)) / 4 for _ in range(2)]
    expected = [np.abs(np.linalg.eigvals(m)).max() for m in matrices]
    # the norm swings as a complex pair turns: many iterations even it out
    radius = spectral_radius(linear_map(matrices), torch.zeros(2, 12, 1, dtype=torch.float64), 4000, seed)
    np.testing.assert_allclose(radius, expected, rtol=2e-3)


def test_spectral_radius_of_a_matrix_far_from_normal() -> None:
    matrix = np.array([[0.5, 50.0], [0.0, 0.4]])
    assert np.linalg.norm(matrix, 2) > 50
    radius = spectral_radius(linear_map([matrix]), torch.zeros(1, 2, 3), 200)
    assert float(radius) == pytest.approx(0.5, rel=1e-3)


def test_spectral_radius_at_a_state_of_a_nonlinear_map() -> None:
    x = torch.tensor([[[0.3]], [[1.1]]], dtype=torch.float64)
    np.testing.assert_allclose(spectral_radius(torch.cos, x), np.abs(np.sin(x[:, 0, 0])), rtol=1e-9)
    assert spectral_radius(lambda x: 0.0 * x, x).tolist() == [0, 0]
    assert spectral_radius(lambda x: x * torch.tensor([math.nan, 2.0]).view(2, 1, 1), x)[0].isnan()
    assert spectral_radius(lambda x: torch.ones_like(x), x).tolist() == [0, 0]
    with torch.inference_mode(), pytest.raises(RuntimeError, match="under no_grad, not inference_mode"):
        spectral_radius(torch.cos, x)
    with pytest.raises(ValueError, match="iterations must be at least 2"):
        spectral_radius(torch.cos, x, 1)


@pytest.mark.parametrize("ndim", [2, 3])
def test_residual_at(ndim: int) -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((2, ndim + 1, *SIZES[ndim])))
    residual, relative = residual_at(lambda x: 0.5 * x + 1, x, ndim)
    f = (1 - 0.5 * x[:, :ndim]).numpy()
    g = (1 + 0.5 * x[:, :ndim]).numpy()
    np.testing.assert_allclose(residual, np.sqrt((f**2).sum(1).mean(axis=tuple(range(1, ndim + 1)))))
    np.testing.assert_allclose(relative, [np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(f, g, strict=True)])
    residual, relative = residual_at(lambda x: x, torch.zeros(1, ndim, *SIZES[ndim]))
    assert (residual.tolist(), relative.tolist()) == ([0.0], [0.0])


def test_verdicts() -> None:
    steps = np.arange(40)
    falling, cycle = 0.9**steps, 0.1 + 0.02 * np.sin(steps)
    assert verdict(falling, 1e-3, True) == "converged"
    assert verdict(falling, 0.02, False) == "step limit"
    assert verdict(0.99**steps, 0.66, False) == "step limit"
    assert verdict(cycle, 0.1, False) == "cycling"
    assert verdict(np.full(40, 0.3), 0.3, False) == "cycling"
    assert verdict(1.1**steps, 50.0, False) == "diverging"
    assert verdict([0.1, math.inf], 0.1, False) == "diverging"
    assert verdict([0.1, 0.1], math.nan, False) == "diverging"
    assert verdict(cycle[:6], 0.1, False) == "step limit"
    assert verdict([], 0.1, False) == "step limit"


@pytest.mark.parametrize("ndim", [2, 3])
def test_random_smooth_ddf(ndim: int) -> None:
    shape = (2, ndim, *[40, 36, 44][:ndim])
    field = random_smooth_ddf(shape, rms=3.0, smoothness=4.0, seed=1)
    assert field.shape == shape and field.dtype == torch.float32
    np.testing.assert_allclose((field.double() ** 2).sum(1).flatten(1).mean(1).sqrt(), [3.0, 3.0], rtol=1e-6)
    assert torch.equal(field, random_smooth_ddf(shape, rms=3.0, smoothness=4.0, seed=1))
    assert not torch.equal(field, random_smooth_ddf(shape, rms=3.0, smoothness=4.0, seed=2))
    # noise under a Gaussian of sigma s has correlation exp(-d^2 / 4 s^2) at distance d, away from the borders
    inner = field[(..., *[slice(8, -8)] * ndim)].double().numpy()
    d = 4
    a, b = inner[:, :, d:], inner[:, :, :-d]
    assert (a * b).mean() / (inner**2).mean() == pytest.approx(math.exp(-(d**2) / 64), abs=0.12)
    for kwargs in ({"rms": -1.0}, {"rms": math.nan}, {"smoothness": 0.0}):
        with pytest.raises(ValueError, match="rms must not be negative and smoothness above 0"):
            random_smooth_ddf(shape, **kwargs)


@pytest.mark.parametrize("ndim", [2, 3])
def test_random_fields_are_smoothed_where_they_are_used(ndim: int, smoothed_on: list[str]) -> None:
    shape = (1, ndim, *[20, 18, 22][:ndim])
    # no device but the CPU has its own noise, and no autocast reaches the smoothing
    expected = random_smooth_ddf(shape, smoothness=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(random_smooth_ddf(shape, smoothness=2.0), expected)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[0].numpy()
    # the share of a Gaussian of sigma 2 in each voxel, to four sigma
    weights = np.diff([math.erf((n - 0.5) / (2 * math.sqrt(2))) / 2 for n in range(-8, 10)])
    smooth = noise
    for axis in range(1, ndim + 1):
        smooth = convolve1d(smooth, weights, axis, mode="constant")
    smooth *= 3.0 / np.sqrt((smooth**2).sum(0).mean())
    np.testing.assert_allclose(expected[0], smooth, atol=1e-5)
    assert smoothed_on == ["cpu", "cpu"]
    field = random_smooth_ddf(shape, smoothness=2.0, device="meta", dtype=torch.float64)
    assert (field.device.type, field.dtype) == ("meta", torch.float64) and smoothed_on[2:] == ["meta"]


class PullToFixed(torch.nn.Module):
    """Moves the field by a share of the way to the value of the fixed image, and where ``turn`` is set turns it."""

    def __init__(self, rate: float, turn: bool = False) -> None:
        super().__init__()
        self.rate, self.turn = rate, turn

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        if self.turn:
            return torch.cat([-ddf[:, 1:2] + 1, ddf[:, :1]], dim=1) - ddf
        return self.rate * (fixed - ddf)


def test_certify_a_contraction() -> None:
    fixed = torch.rand((2, 1, 7, 6), generator=torch.Generator().manual_seed(0))
    network = DEQRegistrationNet(PullToFixed(0.5), max_steps=40, tolerance=1e-4, num_states=0).eval()
    state, record = network.solve_state(fixed, fixed)
    a, b = certify(
        network, fixed, fixed, state, record, 1e-4, spectral_iterations=6, random_starts=2, start_smoothness=1.0
    )
    residual = 0.5 * (fixed - state).square().sum(1).mean((1, 2)).sqrt()
    for i, c in enumerate((a, b)):
        assert c.verdict == "converged" and c.steps == record.steps[i] < 40
        assert c.residual == pytest.approx(float(residual[i]), rel=1e-2) and 0 < c.residual < record.final_residual[i]
        assert c.spectral_radius == pytest.approx(0.5, rel=1e-5)
        # each solution is within residual / (1 - radius) of the only one
        assert c.start_distance is not None and 0 < c.start_distance < 4e-4
        assert c.as_dict()["verdict"] == "converged" and c.as_dict()["spectral_radius"] == c.spectral_radius


def test_certify_tells_a_cycle_and_a_start_that_is_kept() -> None:
    fixed = torch.zeros((1, 1, 7, 6))
    turning = DEQRegistrationNet(PullToFixed(0.0, turn=True), max_steps=17, num_states=0).eval()
    state, record = turning.solve_state(fixed, fixed)
    (c,) = certify(turning, fixed, fixed, state, record, 1e-3, spectral_iterations=8)
    assert c.verdict == "cycling" and c.spectral_radius == pytest.approx(1.0, abs=1e-6)
    assert c.residual == pytest.approx(1.0) and c.start_distance is None
    # a map that leaves every state where it is comes to rest at once, wherever it starts
    still = DEQRegistrationNet(PullToFixed(0.0), num_states=0).eval()
    state, record = still.solve_state(fixed, fixed)
    (c,) = certify(still, fixed, fixed, state, record, 1e-3, random_starts=1, start_rms=2.0, start_smoothness=1.0)
    assert c.verdict == "converged" and c.start_distance == pytest.approx(2.0, rel=1e-5) and c.spectral_radius is None


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_certificate_of_a_pair_does_not_depend_on_its_batch(ndim: int) -> None:
    torch.manual_seed(0)
    moving, fixed = torch.rand(2, 3, 1, *(16, 20, 12)[:ndim])
    update = UNetUpdate(ndim, RegistrationUNet(ndim, 2 + ndim, None, (4, 4), (4,), (4,), flow_std=0.3))
    # cut off: neither the start nor the vector of the spectral radius is forgotten
    network = DEQRegistrationNet(update, max_steps=3, num_states=0).eval()

    def certificates(items: list[int]) -> list[Certificate]:
        state, record = network.solve_state(moving[items], fixed[items])
        settings = {"spectral_iterations": 3, "random_starts": 2}
        return certify(network, moving[items], fixed[items], state, record, 0.0, **settings)

    alone = [certificates([i])[0] for i in range(3)]
    for items in ([0, 1, 2], [2, 0], [1, 1]):
        for i, certificate in zip(items, certificates(items), strict=True):
            assert certificate.start_distance == pytest.approx(alone[i].start_distance, rel=1e-4)
            assert certificate.spectral_radius == pytest.approx(alone[i].spectral_radius, rel=1e-4)
    assert alone[0].start_distance != pytest.approx(alone[1].start_distance, rel=1e-3)


@pytest.mark.parametrize("ndim", [2, 3])
def test_certify_takes_the_hidden_state_and_the_finest_level(ndim: int) -> None:
    torch.manual_seed(0)
    fixed, moving = torch.rand(2, 1, 1, *(16, 20, 12)[:ndim])
    update = RecurrentUpdate(ndim, hidden_size=2, flow_std=0.3)
    for network in (DEQRegistrationNet(update, max_steps=9), UnrolledRegistrationNet(update, steps=[1, 9])):
        network.eval()
        state, record = network.solve_state(moving, fixed)
        ddf, _ = network.solve(moving, fixed)
        assert state.shape[1] == ndim + update.hidden_channels
        torch.testing.assert_close(state[:, :ndim], ddf)
        (c,) = certify(network, moving, fixed, state, record, 0.0, spectral_iterations=4, random_starts=1)
        after, _ = network.solve_state(moving, fixed, max_steps=10)
        expected = (after - state)[:, :ndim].square().sum(1).mean().sqrt()
        assert c.residual == pytest.approx(float(expected), rel=1e-3)
        assert c.spectral_radius is not None and c.spectral_radius > 0
        assert c.start_distance is not None and c.start_distance > 0


class Waiting(torch.nn.Module):
    """Its hidden state counts up; the field rests until the count is at 20, and moves from then on."""

    hidden_channels = 1

    def forward(
        self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (hidden > 20).to(ddf.dtype).expand_as(ddf), hidden + 1


def test_a_hidden_state_that_moves_is_not_at_rest() -> None:
    fixed = torch.zeros((1, 1, 7, 6))
    network = DEQRegistrationNet(Waiting(), num_states=0, max_steps=12).eval()
    state, record = network.solve_state(fixed, fixed)
    (c,) = certify(network, fixed, fixed, state, record, 1e-3)
    assert not record.converged and c.residual == 0 and c.verdict != "converged"


def test_further_solves_and_relative_tolerance_are_those_of_the_solve() -> None:
    fixed = torch.rand((1, 1, 7, 6), generator=torch.Generator().manual_seed(0))
    network = DEQRegistrationNet(PullToFixed(0.5), max_steps=60, tolerance=1e-4, num_states=0).eval()
    loose = {"tolerance": 1.0, "random_starts": 1, "start_smoothness": 1.0}
    _, _, certificates = certified_solve(network, fixed, fixed, certificate=loose)
    # a loose word for converged leaves the other solution as exact as the first
    assert certificates is not None and certificates[0].start_distance < 3e-4  # type: ignore[operator]
    settings = {"tolerance": 0.0, "relative_tolerance": 1e-2}
    _, record, certificates = certified_solve(network, fixed, fixed, certificate={}, **settings)
    assert bool(record.converged) and certificates is not None and certificates[0].verdict == "converged"


def test_certificate_settings() -> None:
    assert check_certificate(None) is None
    given = {"spectral_iterations": 0, "random_starts": 2}
    assert check_certificate(given) == given and check_certificate(given) is not given
    with pytest.raises(TypeError, match="certificate takes tolerance, .* got spectral_iteration"):
        check_certificate({"spectral_iteration": 40})
    for name, value in {"spectral_iterations": 1, "random_starts": -1, "tolerance": math.nan, "start_rms": -1}.items():
        with pytest.raises(ValueError, match=f"certificate: {name} is out of its range"):
            check_certificate({name: value})


def test_certify_refuses() -> None:
    fixed = torch.zeros((1, 1, 7, 6))
    network = DEQRegistrationNet(PullToFixed(0.5), num_states=0).eval()
    solution = network.solve_state(fixed, fixed)
    with pytest.raises(ValueError, match="tolerance must not be negative"):
        certify(network, fixed, fixed, *solution, -1.0)
    for name in ("spectral_iterations", "random_starts"):
        with pytest.raises(ValueError, match="must not be negative, got"):
            certify(network, fixed, fixed, *solution, 1e-3, **{name: -1})
