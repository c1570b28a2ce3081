# SPDX-License-Identifier: Apache-2.0
"""FixedPointInferer: a batch of pairs, each solved as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import deq_net, tiny_recurrent_update
from scipy import ndimage
from torch.nn.parallel import DistributedDataParallel

from monai_deq.baselines import InitialAlignment
from monai_deq.inferers import FixedPointInferer
from monai_deq.networks.nets import DEQRegistrationNet, EnergyRegistrationNet, UnrolledRegistrationNet


class PullToBrightness(torch.nn.Module):
    """Halves the way to a constant field whose every component is the largest value of the pair's fixed image."""

    def __init__(self) -> None:
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        return self.share * (fixed.amax(dim=tuple(range(1, fixed.ndim)), keepdim=True) - ddf)


def make_network(**kwargs: Any) -> DEQRegistrationNet:
    return deq_net(PullToBrightness(), **{"num_states": 0, "tolerance": 0.1, "max_steps": 20, **kwargs}).eval()


def make_batch(ndim: int, brightness: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    size = (7, 6, 5)[:ndim]
    generator = torch.Generator().manual_seed(0)
    moving = torch.rand((len(brightness), 1, *size), generator=generator)
    fixed = torch.zeros_like(moving)
    fixed.flatten(1)[:, 3] = torch.tensor(brightness)
    return moving, fixed


@pytest.mark.parametrize("ndim", [2, 3])
def test_each_item_has_its_own_record(ndim: int) -> None:
    brightness = (0.2, 3.0, 500.0, float("inf"))
    moving, fixed = make_batch(ndim, brightness)
    out = FixedPointInferer(max_steps=8)(moving, make_network(), fixed)
    assert set(out) == {"warped", "ddf", "steps", "evaluations", "residual", "relative_residual", "converged", "reason"}
    # residual of step k: 0.5^k * brightness * sqrt(ndim), to be at most 0.1
    root = ndim**0.5
    steps = [next((k for k in range(1, 9) if 0.5**k * b * root <= 0.1), 8) for b in brightness[:3]]
    assert steps[0] < steps[1] < steps[2] == 8
    assert out["steps"].tolist() == [*steps, 0]
    assert out["reason"] == ["tolerance", "tolerance", "step limit", "non-finite"]
    assert out["converged"].tolist() == [True, True, False, False]
    truth = torch.tensor([b * (1 - 0.5**k) for b, k in zip(brightness[:3], steps, strict=True)])
    torch.testing.assert_close(out["ddf"][:3], truth.view(3, *[1] * (ndim + 1)).expand(3, ndim, *moving.shape[2:]))
    residual = [0.5**k * b * root for b, k in zip(brightness[:3], steps, strict=True)]
    np.testing.assert_allclose(out["residual"][:3], residual, rtol=1e-5)
    np.testing.assert_allclose(out["relative_residual"][:3], [0.5**k / (1 - 0.5**k) for k in steps], rtol=1e-5)
    for i in range(2):
        grid = np.stack(np.meshgrid(*map(np.arange, moving.shape[2:]), indexing="ij"))
        expected = ndimage.map_coordinates(
            moving[i, 0].double().numpy(), grid + out["ddf"][i].double().numpy(), order=1, mode="nearest"
        )
        np.testing.assert_allclose(out["warped"][i, 0], expected, atol=1e-5)
        alone = FixedPointInferer(max_steps=8)(moving[i : i + 1], make_network(), fixed[i : i + 1])
        torch.testing.assert_close(alone["ddf"][0], out["ddf"][i])
        assert alone["steps"] == out["steps"][i] and alone["reason"] == [out["reason"][i]]


def test_settings_in_place_of_the_networks_own() -> None:
    moving, fixed = make_batch(2, (4.0,))
    network = make_network()

    def steps(**settings: Any) -> int:
        return int(FixedPointInferer(**settings)(moving, network, fixed)["steps"])

    own = steps()
    # 0.5^k * 4 * sqrt(2) <= 0.1 first at k = 6
    assert own == 6 == steps(max_steps=None, tolerance=None, solver=None, solver_options=None)
    assert steps(max_steps=2) == 2 and steps(tolerance=0.5) == 4
    assert steps(relative_tolerance=0.5) == 2
    assert steps(solver="anderson") < own
    with pytest.raises(TypeError, match="max_step"):
        FixedPointInferer(max_step=3)
    with pytest.raises(ValueError, match="window"):
        steps(solver_options={"window": 3})


@pytest.mark.parametrize("driver", ["equilibrium", "unrolled"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_network_with_hidden_state(ndim: int, driver: str) -> None:
    update = tiny_recurrent_update(ndim)
    network: torch.nn.Module = UnrolledRegistrationNet(update, steps=2)
    if driver == "equilibrium":
        network = deq_net(update, max_steps=2, num_states=0)
    moving, fixed = torch.rand(2, 2, 1, *(7, 6, 5)[:ndim])
    out = FixedPointInferer(max_steps=4, tolerance=0.0)(moving, network.eval(), fixed)
    assert out["ddf"].shape == (2, ndim, *moving.shape[2:]) and out["steps"].tolist() == [4, 4]
    assert out["residual"].shape == (2,) and bool(out["residual"].isfinite().all())
    with torch.no_grad():
        ddf, hidden = torch.zeros_like(out["ddf"]), torch.zeros(2, 4, *moving.shape[2:])
        for _ in range(4):
            delta, hidden = update(moving, fixed, ddf, hidden)
            ddf = ddf + delta
    assert float(ddf.abs().max()) > 0.05
    torch.testing.assert_close(out["ddf"], ddf)
    torch.testing.assert_close(out["residual"], delta.square().sum(1).flatten(1).mean(1).sqrt(), rtol=1e-4, atol=0)


def test_warm_start_gradients_and_wrapped_networks(tmp_path: Path) -> None:
    moving, fixed = make_batch(2, (4.0, 1.0))
    network = make_network()
    cold = FixedPointInferer()(moving, network, fixed)
    warm = FixedPointInferer()(moving, network, fixed, cold["ddf"])
    assert warm["steps"].tolist() == [1, 1]
    assert not FixedPointInferer()(moving.requires_grad_(), network, fixed)["warped"].requires_grad

    # a group of one process
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(network)
        torch.testing.assert_close(FixedPointInferer()(moving, parallel, fixed)["ddf"], cold["ddf"])
        del parallel  # the last to hold the group would wait for Gloo's threads, which may wait for it
    finally:
        torch.distributed.destroy_process_group()


def test_certificate_of_each_item() -> None:
    moving, fixed = make_batch(2, (3.0, 500.0))
    network = make_network()
    plain = FixedPointInferer(max_steps=11)(moving, network, fixed)
    out = FixedPointInferer({}, max_steps=11)(moving, network, fixed)
    assert set(out) == {*plain, "verdict"} and out["verdict"] == ["converged", "step limit"]
    torch.testing.assert_close(out["ddf"], plain["ddf"])
    # at the solution itself, half of what the last step started from
    torch.testing.assert_close(out["residual"].float(), plain["residual"] / 2)
    settings = {"spectral_iterations": 6, "random_starts": 2, "start_smoothness": 1.0}
    out = FixedPointInferer(settings, max_steps=11)(moving, network, fixed)
    np.testing.assert_allclose(out["spectral_radius"], [0.5, 0.5], rtol=1e-5)
    # the map pulls every start to the same field, half of the way a step; the second is cut off at 2^-11 of 500
    assert out["start_distance"].shape == (2,) and 0 < out["start_distance"][0] < 0.2
    # a tolerance of the certificate's own
    assert FixedPointInferer({"tolerance": 1.0}, max_steps=11)(moving, network, fixed)["verdict"] == ["converged"] * 2


@pytest.mark.parametrize("ndim", [2, 3])
def test_answers_of_each_item(ndim: int) -> None:
    moving, fixed = make_batch(ndim, (0.5, 3.0))
    out = FixedPointInferer({"answers": True}, max_steps=40, tolerance=1e-6)(moving, make_network(), fixed)
    # the field is as long in each component as the fixed image is bright: where a component is flipped it comes back
    # twice, and 0.1 more of intensity is 0.1 more of each
    np.testing.assert_allclose(out["answer_flip_max"], [1.0, 6.0], rtol=1e-4)
    np.testing.assert_allclose(out["answer_offset_mean"], [0.1 * ndim**0.5] * 2, rtol=1e-3)
    np.testing.assert_allclose(out["answer_scale_mean"], [0.05 * ndim**0.5, 0.3 * ndim**0.5], rtol=1e-3)
    assert out["answer_swap_mean"].shape == (2,) and "flip" in out["sensitive_to"][1]
    assert "answer_flip_max" not in FixedPointInferer({})(moving, make_network(), fixed)


def test_measures_of_the_energy() -> None:
    moving, fixed = torch.rand(2, 3, 1, 12, 10, generator=torch.Generator().manual_seed(0))
    fixed[1] = moving[1]
    network = EnergyRegistrationNet(spatial_dims=2, steps=(4,), tolerance=0.0).eval()
    out = FixedPointInferer(max_steps=6)(moving, network, fixed)
    record = network.solve(moving, fixed, max_steps=6)[1]
    assert {"energy", "slope", "unfolded"} <= set(out) and "finish_steps" not in out
    assert out["energy"].shape == out["slope"].shape == out["unfolded"].shape == (3,)
    assert torch.equal(out["energy"], record.measures["energy"][:, 5]) and float(out["energy"][1]) < -0.99
    assert out["steps"].tolist() == [6, 6, 6]


@pytest.mark.parametrize("certificate", [None, {}])
def test_finish(certificate: Any) -> None:
    moving, fixed = torch.rand(2, 2, 1, 12, 10, generator=torch.Generator().manual_seed(0))
    network = make_network(max_steps=3)
    finish = EnergyRegistrationNet(spatial_dims=2, steps=(5,)).eval()
    plain = FixedPointInferer(certificate, tolerance=0.0)(moving, network, fixed)
    out = FixedPointInferer(certificate, tolerance=0.0, finish=finish)(moving, network, fixed)
    ddf, record = finish.solve(moving, fixed, plain["ddf"])
    assert torch.equal(out["ddf"], ddf) and not torch.equal(ddf, plain["ddf"])
    grid = np.stack(np.meshgrid(*map(np.arange, (12, 10)), indexing="ij"))
    warped = ndimage.map_coordinates(moving[0, 0].double(), grid + ddf[0].double().numpy(), order=1, mode="nearest")
    np.testing.assert_allclose(out["warped"][0, 0], warped, atol=1e-5)
    # all else is of the solution before it
    for key in set(plain) - {"ddf", "warped"}:
        assert out[key] == plain[key] if isinstance(plain[key], list) else torch.equal(out[key], plain[key])
    new = {"energy", "slope", "unfolded", "finish_steps", "energy_before_finish"}
    assert new <= set(out) - set(plain) <= new | {"energy_before_unfolding", "energy_unfolded"}
    assert out["finish_steps"].tolist() == [5, 5]
    assert torch.equal(out["energy_before_finish"], record.measures["energy"][:, 0])
    assert torch.equal(out["energy"], record.measures["energy"][:, -1])
    assert bool((out["energy"] < out["energy_before_finish"]).all())
    # one that descends itself is not led on by another energy
    own = EnergyRegistrationNet(spatial_dims=2, steps=(4,)).eval()
    out, alone = (FixedPointInferer(certificate, finish=f)(moving, own, fixed) for f in (finish, None))
    assert torch.equal(out["ddf"], alone["ddf"]) and out.keys() == alone.keys() and "finish_steps" not in out


def test_certificate_of_a_classical_method_and_of_unknown_words() -> None:
    moving, fixed = make_batch(2, (3.0, 500.0))
    out = FixedPointInferer({"spectral_iterations": 6})(moving, InitialAlignment().eval(), fixed)
    assert out["verdict"] == ["not iterated"] * 2 and "spectral_radius" not in out
    with pytest.raises(TypeError, match="certificate takes tolerance, .* got radius"):
        FixedPointInferer({"radius": 1})
