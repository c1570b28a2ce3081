# SPDX-License-Identifier: Apache-2.0
"""FixedPointSolver(d) on networks whose equilibrium and whose every step are known in closed form."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import monai.data
import numpy as np
import pytest
import torch
from monai.data import Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, EnsureTyped, SaveImaged, ScaleIntensityd, SelectItemsd
from nets import Pull, deq_net, tiny_recurrent_update, tiny_update
from scipy import ndimage

import monai_deq.transforms as transforms
from monai_deq.baselines import ClassicalRegistration, InitialAlignment
from monai_deq.networks.nets import DEQRegistrationNet, EnergyRegistrationNet, UnrolledRegistrationNet
from monai_deq.transforms import FixedPointSolver, FixedPointSolverd, SaveRegistrationd
from monai_deq.utils import json_ready

SIZES = [(7, 6), (5, 4, 6)]


class PullTo(torch.nn.Module):
    """``f = rate * (target - ddf)``: the state after n steps from zero is ``(1 - (1 - rate)**n) * target``."""

    def __init__(self, target: torch.Tensor, rate: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("target", target)
        self.rate = rate

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        return self.rate * (self.target - ddf)


def field(size: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((len(size), *size), generator=generator) * 3 - 1


def image(size: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    return torch.rand((1, *size), generator=torch.Generator().manual_seed(seed))


def known_network(size: tuple[int, ...], rate: float = 0.5, **kwargs: Any) -> tuple[DEQRegistrationNet, torch.Tensor]:
    target = field(size)
    return deq_net(PullTo(target, rate), **{"num_states": 0, **kwargs}), target


def rms(ddf: torch.Tensor) -> float:
    """Root over the mean over voxels of the squared length of the displacement."""
    return float(ddf.double().square().sum(0).mean().sqrt())


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Records of the same content and types."""
    assert json_ready(a) == json_ready(b)  # where a NaN equals a NaN
    assert {k: type(v) for k, v in a.items()} == {k: type(v) for k, v in b.items()}


def steps_needed(start_residual: float, rate: float, tolerance: float) -> int:
    """First k whose residual ``start_residual * (1 - rate)**(k - 1)`` is at most the tolerance."""
    return 1 + max(0, math.ceil(math.log(tolerance / start_residual) / math.log(1 - rate)))


def scipy_warp(moving: np.ndarray, ddf: np.ndarray) -> np.ndarray:
    coordinates = np.stack(np.meshgrid(*map(np.arange, moving.shape), indexing="ij")) + ddf
    return ndimage.map_coordinates(moving.astype(float), coordinates, order=1, mode="nearest")


def unet_network(ndim: int) -> DEQRegistrationNet:
    return deq_net(tiny_update(ndim), num_states=0, max_steps=4)


@pytest.mark.parametrize("size", SIZES)
def test_solution_steps_and_record(size: tuple[int, ...]) -> None:
    network, target = known_network(size, rate=0.4)
    moving, fixed = image(size), image(size, 2)
    warped, ddf, record = FixedPointSolver(network, max_steps=60, tolerance=1e-2)(moving, fixed)
    steps = steps_needed(0.4 * rms(target), 0.4, 1e-2)
    assert 3 < steps < 60
    assert record["steps"] == steps and record["converged"] and record["reason"] == "tolerance"
    torch.testing.assert_close(ddf, target * (1 - 0.6**steps))
    trace = [0.4 * 0.6**k * rms(target) for k in range(steps)]
    np.testing.assert_allclose(record["residual_trace"], [*trace, *[np.nan] * (60 - steps)], rtol=1e-4)
    assert record["residual"] == pytest.approx(trace[-1], rel=1e-4)
    # |g(x) - x| / |g(x)| at x = (1 - 0.6^(k - 1)) * target
    assert record["relative_residual"] == pytest.approx(0.4 * 0.6 ** (steps - 1) / (1 - 0.6**steps), rel=1e-4)
    np.testing.assert_allclose(warped[0], scipy_warp(moving[0].numpy(), ddf.numpy()), atol=1e-5)
    assert not ddf.requires_grad and not isinstance(ddf, MetaTensor) and ddf.dtype == torch.float32


def test_network_settings_are_the_defaults_and_more_steps_than_trained_go_on() -> None:
    network, target = known_network((6, 5), rate=0.1, max_steps=3, tolerance=1e-4)
    _, short, record = FixedPointSolver(network)(image((6, 5)), image((6, 5)))
    assert (record["steps"], record["converged"], record["reason"]) == (3, False, "step limit")
    torch.testing.assert_close(short, target * (1 - 0.9**3))
    _, long, record = FixedPointSolver(network, max_steps=200)(image((6, 5)), image((6, 5)))
    assert record["converged"] and 3 < record["steps"] < 200
    torch.testing.assert_close(long, target, atol=5e-3, rtol=0)
    assert network.solver.max_steps == 3


def test_tolerances_and_solver() -> None:
    network, target = known_network((6, 5), rate=0.5)
    arguments = image((6, 5)), image((6, 5), 2)
    _, _, record = FixedPointSolver(network, tolerance=0.0, relative_tolerance=0.05)(*arguments)
    # 0.5^k / (1 - 0.5^k) <= 0.05 first at k = 5
    assert (record["steps"], record["reason"]) == (5, "relative tolerance")
    solver = FixedPointSolver(network, solver="anderson", tolerance=1e-5, solver_options={"window": 2})
    _, ddf, record = solver(*arguments)
    # one secant step solves an affine map whose linear part is a multiple of the identity
    assert record["steps"] <= 4
    torch.testing.assert_close(ddf, target, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_warm_start_takes_fewer_steps(size: tuple[int, ...]) -> None:
    network, target = known_network(size, rate=0.3)
    solver = FixedPointSolver(network, tolerance=1e-3, max_steps=100)
    moving, fixed = image(size), image(size, 2)
    _, _, cold = solver(moving, fixed)
    start = 0.9 * target
    _, ddf, warm = solver(moving, fixed, start.double().numpy())
    assert cold["steps"] == steps_needed(0.3 * rms(target), 0.3, 1e-3)
    assert warm["steps"] == steps_needed(0.03 * rms(target), 0.3, 1e-3) < cold["steps"]
    torch.testing.assert_close(ddf, target * (1 - 0.1 * 0.7 ** warm["steps"]))
    torch.testing.assert_close(start, 0.9 * target)


@pytest.mark.parametrize("size", SIZES)
def test_meta_of_the_fixed_image(size: tuple[int, ...]) -> None:
    network, _ = known_network(size)
    fixed_affine = torch.tensor([[0, 0, 2, 5], [1.5, 0, 0, -3], [0, -0.7, 0, 8], [0, 0, 0, 1]], dtype=torch.float64)
    fixed = MetaTensor(image(size), affine=fixed_affine, meta={"filename_or_obj": "fixed.nii.gz"})
    # as read from a file of one image without a channel axis
    fixed.meta["original_channel_dim"] = float("nan")
    moving = MetaTensor(image(size, 2), affine=torch.eye(4) * 9, meta={"filename_or_obj": "moving.nii.gz"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warped, ddf, _ = FixedPointSolver(network)(moving, fixed)
    for result in (warped, ddf):
        assert isinstance(result, MetaTensor) and result.spatial_ndim == len(size)
        torch.testing.assert_close(result.affine, fixed_affine)
        assert result.meta["filename_or_obj"] == "moving.nii.gz"
        result.affine[0, 3] = 100.0
        result.meta["note"] = "changed"
    torch.testing.assert_close(fixed.affine, fixed_affine)
    assert "note" not in fixed.meta


def test_monai_saves_what_was_made_of_each_moving_image(tmp_path: Path) -> None:
    size = (7, 6, 5)
    network, _ = known_network(size)
    fixed = MetaTensor(image(size), affine=torch.eye(4), meta={"filename_or_obj": "atlas.nii.gz"})
    for name in "abcd":
        moving = MetaTensor(image(size, ord(name)), affine=torch.eye(4), meta={"filename_or_obj": f"{name}.nii.gz"})
        item = FixedPointSolverd(network)({"fixed": fixed, "moving": moving})
        SaveImaged("warped", output_dir=tmp_path, output_postfix="warped", separate_folder=False, print_log=False)(item)
        SaveImaged("ddf", output_dir=tmp_path, output_postfix="ddf", separate_folder=False, print_log=False)(item)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}_{what}.nii.gz" for name in "abcd" for what in ("ddf", "warped")
    )


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("kind", ["float64 numpy", "uint8 numpy", "int16 tensor", "float16 tensor", "bfloat16", "bool"])
def test_number_types_with_a_real_network(ndim: int, kind: str) -> None:
    size = (6, 5) if ndim == 2 else (4, 6, 5)
    network = unet_network(ndim)
    # values that every type holds exactly
    moving, fixed = (image(size, seed).round() for seed in (1, 2))
    expected, expected_ddf, _ = FixedPointSolver(network)(moving, fixed)
    assert float(expected_ddf.abs().max()) > 1e-2

    def convert(x: torch.Tensor) -> Any:
        name, _, where = kind.partition(" ")
        return x.numpy().astype(name) if where == "numpy" else x.to(getattr(torch, name))

    warped, ddf, _ = FixedPointSolver(network)(convert(moving), convert(fixed))
    assert isinstance(warped, torch.Tensor) and warped.dtype == ddf.dtype == torch.float32
    torch.testing.assert_close(warped, expected)
    torch.testing.assert_close(ddf, expected_ddf)


@pytest.mark.parametrize("driver", ["equilibrium", "unrolled"])
@pytest.mark.parametrize("size", SIZES)
def test_network_with_hidden_state(size: tuple[int, ...], driver: str) -> None:
    ndim = len(size)
    update = tiny_recurrent_update(ndim)
    network: torch.nn.Module = UnrolledRegistrationNet(update, steps=2)
    if driver == "equilibrium":
        network = deq_net(update, max_steps=2, num_states=0)
    moving, fixed = image(size), image(size, 2)
    ddf, hidden = torch.zeros(1, ndim, *size), torch.zeros(1, 4, *size)
    trace = []
    with torch.no_grad():
        for _ in range(5):
            delta, hidden = update(moving[None], fixed[None], ddf, hidden)
            ddf = ddf + delta
            trace.append(rms(delta[0]))
    assert float(ddf.abs().max()) > 0.05
    item = {"moving": MetaTensor(moving), "fixed": MetaTensor(fixed)}
    out = FixedPointSolverd(network, max_steps=5, tolerance=0.0)(item)
    assert out["ddf"].shape == (ndim, *size) and out["warped"].shape == (1, *size)
    torch.testing.assert_close(out["ddf"].as_tensor(), ddf[0])
    np.testing.assert_allclose(out["warped"][0], scipy_warp(moving[0].numpy(), ddf[0].numpy()), atol=1e-5)
    np.testing.assert_allclose(out["record"]["residual_trace"], trace, rtol=1e-4)
    assert out["record"]["steps"] == 5 and out["record"]["reason"] == "step limit"
    # the network's own number of steps, and a warm start with the hidden state anew
    _, own, record = FixedPointSolver(network)(moving, fixed, ddf[0])
    assert record["steps"] == 2 and own.shape == (ndim, *size)


def test_network_in_double_precision_works_in_double_precision() -> None:
    network = unet_network(2).double()
    warped, ddf, _ = FixedPointSolver(network)(image((6, 5)), image((6, 5), 2))
    assert warped.dtype == ddf.dtype == torch.float64


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_is_left_in_its_mode(fails: bool) -> None:
    network = unet_network(2).train()
    network.update.backbone.final.eval()  # frozen by whoever trains it
    modes = [module.training for module in network.modules()]
    assert True in modes and False in modes
    seen: list[bool] = []
    network.update.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    solver = FixedPointSolver(network)
    if fails:
        with pytest.raises(ValueError):
            solver(image((6, 5)), image((6, 6)))
    else:
        solver(image((6, 5)), image((6, 5), 2))
        assert seen == [False] * 4
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_dictionary_form_in_compose(size: tuple[int, ...]) -> None:
    network, target = known_network(size)
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    item = {
        "a": MetaTensor(image(size) * 200, affine=torch.eye(4)),
        "b": MetaTensor(image(size, 2) * 100, affine=affine),
        "name": "pair 1",
    }
    pipeline = Compose(
        [
            EnsureTyped(("a", "b"), track_meta=True),
            ScaleIntensityd(("a", "b")),
            FixedPointSolverd(
                network, "a", "b", ddf_key="u", warped_key="w", record_key="said", tolerance=1e-4, max_steps=99
            ),
            FixedPointSolverd(network, "a", "b", initial_ddf_key="u", record_key="again", tolerance=1e-4),
        ]
    )
    out = pipeline(item)
    assert set(out) == {"a", "b", "name", "u", "w", "said", "ddf", "warped", "again"}
    assert set(item) == {"a", "b", "name"}
    torch.testing.assert_close(out["u"].as_tensor(), target, atol=1e-3, rtol=0)
    torch.testing.assert_close(out["u"].affine, affine)
    torch.testing.assert_close(out["w"].affine, affine)
    assert out["said"]["converged"] and out["said"]["steps"] > 5 and len(out["said"]["residual_trace"]) > 5
    assert out["again"]["steps"] == 1
    expected = scipy_warp(out["a"][0].numpy(), out["u"].numpy())
    np.testing.assert_allclose(out["w"][0], expected, atol=1e-5)


def test_item_without_a_warm_start_starts_from_zero() -> None:
    network, target = known_network((6, 5), max_steps=1)
    solver = FixedPointSolverd(network, initial_ddf_key="before")
    images = {"moving": image((6, 5)), "fixed": image((6, 5), 2)}
    torch.testing.assert_close(solver(images)["ddf"], 0.5 * target)
    torch.testing.assert_close(solver({**images, "before": None})["ddf"], 0.5 * target)
    torch.testing.assert_close(solver({**images, "before": target})["ddf"], target)


def test_certificate_in_the_record() -> None:
    network, _ = known_network(SIZES[0])
    moving, fixed = image(SIZES[0]), image(SIZES[0], seed=2)
    _, ddf, plain = FixedPointSolver(network)(moving, fixed)
    settings = {"spectral_iterations": 6, "random_starts": 1, "start_smoothness": 1.0}
    _, certified, record = FixedPointSolver(network, certificate=settings)(moving, fixed)
    assert set(record) == {*plain, "verdict", "spectral_radius", "start_distance"}
    torch.testing.assert_close(certified, ddf)
    assert record["verdict"] == "converged" and record["spectral_radius"] == pytest.approx(0.5, rel=1e-5)
    assert record["residual"] == pytest.approx(plain["residual"] / 2, rel=1e-3) and record["start_distance"] < 0.01
    answered = FixedPointSolver(network, certificate={"answers": True})(moving, fixed)[2]
    assert answered["answer_offset_max"] >= answered["answer_offset_mean"] >= 0 and answered["sensitive_to"]
    # not asked for: named all the same, and no number
    _, _, cheap = FixedPointSolver(network, certificate={})(moving, fixed)
    assert cheap["verdict"] == "converged" and math.isnan(cheap["spectral_radius"])


@pytest.mark.parametrize("certificate", [None, {}])
@pytest.mark.parametrize("size", [(9, 8), (8, 9, 10)])
def test_finish_in_the_record(size: tuple[int, ...], certificate: Any) -> None:
    network, target = known_network(size)
    moving, fixed = image(size), image(size, seed=2)
    finish = EnergyRegistrationNet(spatial_dims=len(size), steps=(5,), least_jacobian=None).eval()
    _, plain, without = FixedPointSolver(network, max_steps=3, certificate=certificate)(moving, fixed)
    warped, ddf, record = FixedPointSolver(network, max_steps=3, certificate=certificate, finish=finish)(moving, fixed)
    expected, finished = finish.solve(moving[None], fixed[None], plain[None])
    assert torch.equal(ddf, expected[0]) and not torch.equal(ddf, plain)
    np.testing.assert_allclose(warped[0], scipy_warp(moving[0].numpy(), ddf.numpy()), atol=1e-5)
    said = record["finish"]
    more = {k: said[k] for k in ("energy", "slope")}
    more |= {"finish": said, "finish_steps": 5, "energy_before_finish": said["energy_trace"][0].item()}
    # the traces of both methods are of one length
    traces = {k: torch.cat([v, v.new_full((2,), torch.nan)]) for k, v in without.items() if k.endswith("_trace")}
    assert_same(record, {**without, **traces, **more})
    assert_same(said, finished.item(0))
    assert said["steps"] == len(said["energy_trace"]) == 5 and said["energy"] < said["energy_trace"][0]
    out = FixedPointSolverd(network, max_steps=3, certificate=certificate, finish=finish)(
        {"moving": moving, "fixed": fixed}
    )
    assert torch.equal(out["ddf"], ddf)
    assert_same(out["record"], record)


def test_energy_in_the_record() -> None:
    # a network without a parameter, whose device and type are the defaults
    moving, fixed = image((12, 9)).double(), image((12, 9), seed=2).double()
    network = EnergyRegistrationNet(spatial_dims=2, steps=(4,))
    warped, ddf, record = FixedPointSolver(network, max_steps=6, tolerance=0.0)(moving, fixed)
    assert warped.dtype == ddf.dtype == torch.float32 and network.training
    trace = record["energy_trace"]
    assert len(trace) == len(record["slope_trace"]) == record["steps"] == 6
    assert record["energy"] == trace[-1].item() < trace[0] and isinstance(record["unfolded"], int)


def test_evaluations_of_coarser_networks_in_the_record() -> None:
    def net(share: float, **kwargs: Any) -> DEQRegistrationNet:
        return deq_net(Pull(share), num_states=0, tolerance=0.0, **kwargs)

    network = net(0.5, max_steps=3, coarse=net(0.5, max_steps=8, coarse=net(0.5, max_steps=16)))
    _, _, record = FixedPointSolver(network)(image((8, 12)), image((8, 12), 2))
    assert record["steps"] == 3 and record["coarse_steps"].tolist() == [8, 16]
    assert record["evaluations"] == 3 + 8 / 4 + 16 / 16


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_a_classical_method(device: Any) -> None:
    moving, fixed, start = image(SIZES[0]), image(SIZES[0], 2), field(SIZES[0])
    for certificate in (None, {}):
        solver = FixedPointSolver(InitialAlignment(), certificate=certificate, device=device)
        warped, ddf, record = solver(moving, fixed, start)
        assert torch.equal(ddf, start) and record["reason"] == "not iterated"
        assert record.get("verdict") == (None if certificate is None else "not iterated")
        np.testing.assert_allclose(warped[0], scipy_warp(moving[0].numpy(), start.numpy()), atol=1e-5)


class AnotherMethod(ClassicalRegistration):
    """A method outside, which hands a displacement back."""

    reason = "another"

    def solve(self, moving: torch.Tensor, fixed: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return torch.ones(len(fixed), 2, *fixed.shape[2:]), self._record(len(fixed))


def shift_net(share: float, **kwargs: Any) -> DEQRegistrationNet:
    return deq_net(Pull(share), spatial_dims=2, num_states=0, **kwargs)


#: by what is in the record
COLLATED: dict[str, dict[str, Any]] = {
    "plain": {"network": shift_net(0.5)},
    "anderson": {"network": shift_net(0.4), "solver": "anderson", "max_steps": 7, "tolerance": 0.0},
    "certificate": {"network": shift_net(0.5), "certificate": {}},
    "whole certificate": {
        "network": shift_net(0.5),
        "certificate": {"spectral_iterations": 3, "random_starts": 1, "start_smoothness": 1.0},
    },
    "coarser networks": {"network": shift_net(0.5, coarse=shift_net(0.5, coarse=shift_net(0.5)))},
    "proximal centre": {
        "network": shift_net(0.5, coarse=shift_net(0.5), proximal_weight=0.2),
        "certificate": {"random_starts": 1},
    },
    "unrolled": {"network": UnrolledRegistrationNet(Pull(), steps=(2, 3)), "certificate": {}},
    "hidden state": {"network": deq_net(tiny_recurrent_update(2), max_steps=4, num_states=0)},
    "finish": {
        "network": shift_net(0.5, max_steps=4),
        "finish": EnergyRegistrationNet(spatial_dims=2, steps=(6,), tolerance=0.02).eval(),
        "certificate": {},
    },
    # the smallest size is left out, as it would have four voxels along an axis; with a warm start the next one too
    "energy": {"network": EnergyRegistrationNet(spatial_dims=2, steps=(2, 3, 9), tolerance=0.02), "certificate": {}},
    "initial alignment": {"network": InitialAlignment(), "certificate": {}},
    "another method": {"network": AnotherMethod()},
}


def registered(case: str) -> Dataset:
    """Three pairs that take different numbers of steps, and one that gives a NaN; the first has a warm start."""
    moving, fixed = image((16, 18)), image((16, 18), 2)
    items = [{"moving": moving * s, "fixed": fixed * s, "moving_subject": f"m{s}"} for s in (1.0, 0.1, 0.0, math.nan)]
    warm = torch.full((2, 16, 18), 0.25)
    items = [{**item, "fixed_subject": "f", **({} if i else {"start": warm})} for i, item in enumerate(items)]
    solver = FixedPointSolverd(initial_ddf_key="start", **COLLATED[case])
    keys = ["ddf", "warped", "record", "moving_subject", "fixed_subject"]
    return Dataset(items, Compose([solver, SelectItemsd(keys)]))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("loader", [monai.data.DataLoader, torch.utils.data.DataLoader])
@pytest.mark.parametrize("case", COLLATED)
def test_records_behind_a_loader(case: str, loader: Any, num_workers: int, tmp_path: Path) -> None:
    data = registered(case)
    alone = [data[i] for i in range(len(data))]
    steps = [item["record"]["steps"] for item in alone]
    assert len(set(steps)) > 1 or not any(steps)
    for batch_size in (1, 4):
        batches = list(loader(data, batch_size=batch_size, num_workers=num_workers))
        items = [item for batch in batches for item in decollate_batch(batch)]
        assert len(batches) == 4 // batch_size and len(items) == 4
        assert torch.cat([batch["record"]["steps"] for batch in batches]).tolist() == steps
        for item, known in zip(items, alone, strict=True):
            assert_same(item["record"], known["record"])
            assert item["ddf"].isnan().all() if known["ddf"].isnan().all() else torch.equal(item["ddf"], known["ddf"])
    files = [tmp_path / name / f"{items[1]['moving_subject']}_to_f_record.json" for name in ("alone", "behind")]
    for item, file in zip((alone[1], items[1]), files, strict=True):
        SaveRegistrationd(file.parent)(item)
    assert files[0].read_text() == files[1].read_text() and "NaN" not in files[0].read_text()


def test_aliases() -> None:
    assert transforms.FixedPointSolverD is transforms.FixedPointSolverd is transforms.FixedPointSolverDict


def test_errors() -> None:
    network, _ = known_network((6, 5))
    with pytest.raises(TypeError, match="network must be a RegistrationNet, which can be solved, got Conv2d"):
        FixedPointSolver(torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match="network must be a RegistrationNet, which can be solved, got Conv2d"):
        FixedPointSolverd(torch.nn.Conv2d(1, 1, 1))
    solver = FixedPointSolver(network)
    with pytest.raises(ValueError, match=r"moving must be a channel-first .*\(6, 5\)"):
        solver(torch.rand(6, 5), image((6, 5)))
    with pytest.raises(ValueError, match=r"fixed must be a channel-first .*str"):
        solver(image((6, 5)), "fixed.nii.gz")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"same shape.*\(1, 1, 6, 5\) and \(1, 1, 5, 6\)"):
        solver(image((6, 5)), image((5, 6)))
    with pytest.raises(ValueError, match=r"\(1, 2, 6, 5\)"):
        solver(torch.rand(2, 6, 5), torch.rand(2, 6, 5))
    with pytest.raises(ValueError, match=r"ddf must have shape \(1, 2, 6, 5\)"):
        solver(image((6, 5)), image((6, 5)), torch.zeros(3, 6, 5))
    with pytest.raises(ValueError, match="newton"):
        FixedPointSolver(network, solver="newton")(image((6, 5)), image((6, 5)))
    with pytest.raises(KeyError, match=r"'fixed'.*\['moving', 'x'\]"):
        FixedPointSolverd(network)({"moving": image((6, 5)), "x": 0})
