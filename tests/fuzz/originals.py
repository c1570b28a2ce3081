# SPDX-License-Identifier: Apache-2.0
"""Small undamaged files of each kind, made once."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from scans import bent, blobs, grid, parts, world
from scans import write as write_scan

from monai_deq.data import StatePool, write_sample_lung_cohort
from monai_deq.handlers import TrainingCheckpoint
from monai_deq.networks import NetworkRecord, describe, save_checkpoint
from monai_deq.networks.blocks import RegistrationUNet, UNetUpdate
from monai_deq.networks.nets import DEQRegistrationNet, RestSettings
from monai_deq.solvers import SolverSettings
from monai_deq.transforms import save_transform

_FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-originals-")

SLICE, VOLUME = (12, 14), (9, 8, 7)
MATRIX = np.array([[0.9, 0.1, 0.0, 3.0], [-0.1, 1.1, 0.05, -2.0], [0.02, 0.0, 1.05, 1.5], [0, 0, 0, 1.0]])
TRANSFORM_FILES = ("field.nii.gz", "field.nii", "field.mha", "field.nrrd", "field.h5", "ddf.nii.gz")
TRANSFORM_FILES += ("chain.h5", "affine.tfm", "affine.txt", "affine.mat", "affine.h5")


def tiny_network() -> DEQRegistrationNet:
    torch.manual_seed(0)
    unet = RegistrationUNet(2, 4, encoder_channels=(2, 3), decoder_channels=(3,), final_channels=(2,), flow_std=0.05)
    rest = RestSettings(enabled=False)
    return DEQRegistrationNet(UNetUpdate(2, unet), 2, SolverSettings(max_steps=5), rest=rest)


@cache
def originals() -> Path:
    """Folder of scans, transforms, points, a network and a checkpoint of its training. Not to be written to."""
    folder = Path(_FOLDER.name)
    affine, space = grid(SLICE, (3, 3, 3)), grid(VOLUME, (4, 4.5, 5), axes="LPS", turn=(10, -5, 7))
    for end in (".nii.gz", ".nii"):
        write_scan(folder / f"fixed{end}", affine, SLICE)
        write_scan(folder / f"moving{end}", affine, SLICE, of=lambda p: blobs(bent(p)))
        write_scan(folder / f"volume{end}", space, VOLUME, dtype=np.int16)
    write_scan(folder / "label.nii.gz", affine, SLICE, of=parts, dtype=np.int16)
    write_scan(folder / "moving_label.nii.gz", affine, SLICE, of=lambda p: parts(bent(p)), dtype=np.int16)
    (folder / "points.csv").write_text("2.5,3\n4,5.25\n6,7\n")
    (folder / "moving_points.csv").write_text("2,3\n4.5,5.25\n6,6\n")
    _write_transforms(folder, space)
    network = tiny_network()
    save_checkpoint({"network": network.state_dict()}, folder / "model.pt")
    NetworkRecord(network=describe(network), spatial_size=list(SLICE), steps=5).write(folder / "model.json")
    _write_training(folder / "training")
    return folder


def _write_transforms(folder: Path, affine: np.ndarray) -> None:
    points = world(affine, VOLUME)
    millimetres = np.moveaxis(bent(points) - points, -1, 0)
    field = np.tensordot(np.linalg.inv(affine)[:3, :3], millimetres, axes=1).astype(np.float32)
    ddf = MetaTensor(torch.from_numpy(field), affine=torch.from_numpy(affine))
    for name in ("field.nii.gz", "field.nii", "field.mha", "field.nrrd", "field.h5"):
        save_transform(folder / name, ddf)
    nib.save(nib.Nifti1Image(np.moveaxis(field, 0, -1), affine), folder / "ddf.nii.gz")
    save_transform(folder / "chain.h5", [MATRIX, ddf])
    for end in (".tfm", ".txt", ".mat", ".h5"):
        save_transform(folder / f"affine{end}", MATRIX)


class _Slots:
    """Where a pool has its visits."""

    def __init__(self) -> None:
        self.pool = StatePool(4)
        self.pool.put([0, 2], [1, 5], 0.1 * torch.randn(2, 2, *SLICE, generator=torch.Generator().manual_seed(1)))


def training(folder: Path, resume: bool) -> dict[str, Any]:
    """A training of nothing with a pool, begun or resumed: what it goes on with."""
    network = tiny_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)
    pool = StatePool(4) if resume else _Slots().pool
    handler = TrainingCheckpoint(folder, network, {"optimizer": optimizer, "pool": pool}, resume=resume)
    engine = Engine(lambda engine, batch: optimizer.step() if not resume else None)
    engine.data_loader = [0, 1]  # type: ignore[attr-defined]
    handler.attach(engine)
    engine.run([0, 1], max_epochs=1)
    state = optimizer.state_dict()["state"]
    return {"network": dict(network.state_dict()), "optimizer": state, "pool": pool.state_dict()}


def _write_training(folder: Path) -> None:
    folder.mkdir()
    training(folder, resume=False)


@cache
def lung_task() -> Path:
    """Folder of a Learn2Reg task, whose files are empty but for the JSON file."""
    whole, folder = Path(_FOLDER.name) / "whole", Path(_FOLDER.name) / "task"
    write_sample_lung_cohort(whole, (2, 1, 2), (16, 16, 16))
    for file in whole.rglob("*.*"):
        (folder / file.relative_to(whole)).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.relative_to(whole)).write_bytes(b"")
    shutil.copy(whole / "NLST_dataset.json", folder)
    shutil.rmtree(whole)
    return folder


def summary() -> dict[str, Any]:
    """What an evaluation of three pairs wrote."""
    dice = (0.7, 0.8, 0.6)
    pairs = [{"fixed": f"f{i}", "moving": f"m{i}", "dice": d, "steps": 9 + i} for i, d in enumerate(dice)]
    content: dict[str, Any] = {"method": "A", "data_set": "brains", "labels": {"3": "left"}, "num_pairs": 3}
    content |= {"verdicts": {"converged": 3}, "pairs": pairs}
    content["summary"] = {"dice": {"mean": 0.7, "std": 0.1, "pairs": 3}, "steps": {"mean": 10.0, "pairs": 3}}
    content["per_label"] = {"dice": {"3": {"name": "left", "mean": 0.7, "std": 0.1, "pairs": 3}}}
    return dict(json.loads(json.dumps(content)))
