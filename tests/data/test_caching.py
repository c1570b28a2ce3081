# SPDX-License-Identifier: Apache-2.0
"""cached_subjects: what comes out of a cache, in memory or on disk, is what the files hold, and stays so."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms import MapTransform

from monai_deq.data import PairDataset, cached_pairs, cached_subjects, grid_of
from monai_deq.networks import load_checkpoint
from monai_deq.transforms import LoadRegistrationImaged, load_subject_transforms

# a coronal slice: its second axis is the third of the world
AFFINE = np.array([[1.5, 0, 0, 3], [0, 0, -2, 7], [0, 0.5, 0, -4], [0, 0, 0, 1.0]])
SIZES = {2: (8, 6, 1), 3: (8, 6, 4)}


def make_subjects(folder: Path, ndim: int, count: int = 2) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    subjects = []
    for i in range(count):
        image, label = rng.random(SIZES[ndim]).astype(np.float32), rng.integers(0, 5, SIZES[ndim]).astype(np.uint8)
        for name, array in (("image", image), ("label", label)):
            nib.save(nib.Nifti1Image(array, AFFINE), folder / f"{name}{i}.nii.gz")
        label_file = str(folder / f"label{i}.nii.gz") if i != 2 else None
        subjects.append({"subject": f"s{i}", "image": str(folder / f"image{i}.nii.gz"), "label": label_file})
    return subjects


class Reads:
    """Counts what is read from files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: list[str] = []
        original = LoadRegistrationImaged.__call__

        def counting(transform: MapTransform, data: Any) -> Any:
            self.files += [str(data[key]) for key in transform.keys if key in data]
            return original(transform, data)

        monkeypatch.setattr(LoadRegistrationImaged, "__call__", counting)


def assert_is_the_file(image: torch.Tensor, path: str, ndim: int) -> None:
    file = nib.load(path)
    dtype = torch.int32 if Path(path).name.startswith("label") else torch.float32
    assert isinstance(image, MetaTensor) and image.dtype == dtype and image.spatial_ndim == ndim
    np.testing.assert_array_equal(image.as_tensor()[0], file.get_fdata(dtype=np.float32).reshape(SIZES[ndim][:ndim]))
    np.testing.assert_allclose(image.affine, file.affine)
    assert image.meta["filename_or_obj"] == path
    grid = grid_of(image)
    assert grid is not None
    np.testing.assert_allclose(grid.spacing, (1.5, 0.5, 2)[:ndim])


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("on_disk", [False, True])
def test_every_read_gives_the_same_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ndim: int, on_disk: bool
) -> None:
    subjects = make_subjects(tmp_path, ndim)
    reads = Reads(monkeypatch)
    cache = tmp_path / "cache" if on_disk else None

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # MONAI warns of a file that it cannot read back
        for again in range(3):
            # a new run finds the cache of the last one
            dataset = cached_subjects(subjects, load_subject_transforms(ndim), cache)
            assert len(dataset) == 2
            for subject, item in [(s, dataset[i]) for _ in range(2) for i, s in enumerate(subjects)]:
                assert set(item) == {"subject", "image", "label"} and item["subject"] == subject["subject"]
                assert_is_the_file(item["image"], subject["image"], ndim)
                assert_is_the_file(item["label"], subject["label"], ndim)
            files = sorted(v for s in subjects for v in (s["image"], s["label"]))
            assert sorted(reads.files) == sorted(files * (1 if on_disk else again + 1))
    assert (len(list(cache.iterdir())) if cache else 0) == (2 if on_disk else 0)


@pytest.mark.parametrize("on_disk", [False, True])
def test_pairs_do_not_spoil_the_cache(tmp_path: Path, on_disk: bool) -> None:
    subjects = make_subjects(tmp_path, 2)
    dataset = cached_subjects(subjects, load_subject_transforms(2), tmp_path / "cache" if on_disk else None)
    pairs = PairDataset(dataset, "all")
    for _ in range(2):
        for i, (fixed, moving) in enumerate([(0, 1), (1, 0)]):
            pair = pairs[i]
            assert (pair["fixed_subject"], pair["moving_subject"]) == (f"s{fixed}", f"s{moving}")
            for key, file in (
                ("fixed", subjects[fixed]["image"]),
                ("moving", subjects[moving]["image"]),
                ("fixed_label", subjects[fixed]["label"]),
                ("moving_label", subjects[moving]["label"]),
            ):
                assert_is_the_file(pair[key], file, 2)
                pair[key].mul_(0).add_(7)
                pair[key].affine[:] = 0
                pair[key].meta["filename_or_obj"] = "spoilt"


def test_resizing_belongs_to_the_cache(tmp_path: Path) -> None:
    """A cache that was filled at one image size is not taken for that of another; affines of the new size are kept."""
    subjects = make_subjects(tmp_path, 3)
    for _ in range(2):
        for size in (None, (4, 6, 8), (4, 3, 4)):
            item = cached_subjects(subjects, load_subject_transforms(3, size), tmp_path / "cache")[1]
            expected = load_subject_transforms(3, size)(subjects[1])
            for key in ("image", "label"):
                assert tuple(item[key].shape) == (1, *(size or SIZES[3]))
                assert torch.equal(item[key].as_tensor(), expected[key].as_tensor())
                assert torch.equal(item[key].affine, expected[key].affine)
    assert len(list((tmp_path / "cache").iterdir())) == 3


PROGRAM = """
import sys
from monai_deq.data import cached_subjects
from monai_deq.transforms import load_subject_transforms
subject = {"subject": "s0", "image": sys.argv[1], "label": sys.argv[2]}
cached_subjects([subject], load_subject_transforms(2, (4, 4)), sys.argv[3])[0]
"""


def test_another_process_finds_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (subject,) = make_subjects(tmp_path, 2, 1)
    cache = tmp_path / "cache"
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, subject["image"], subject["label"], str(cache)]
    subprocess.run(command, check=True)
    reads = Reads(monkeypatch)
    item = cached_subjects([subject], load_subject_transforms(2, (4, 4)), cache)[0]
    assert item["image"].shape == (1, 4, 4) and reads.files == [] and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("kept", [0, 0.5, None])
def test_damaged_cache_file_is_made_anew(tmp_path: Path, kept: float | None) -> None:
    (subject,) = make_subjects(tmp_path, 2, 1)
    cached_subjects([subject], load_subject_transforms(2), tmp_path / "cache")[0]
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    file.write_bytes(b"rubbish" if kept is None else content[: int(kept * len(content))])
    for _ in range(2):
        item = cached_subjects([subject], load_subject_transforms(2), tmp_path / "cache")[0]
        assert_is_the_file(item["image"], subject["image"], 2)
    assert len(file.read_bytes()) == len(content)


@pytest.mark.parametrize("on_disk", [False, True])
def test_subject_without_a_segmentation(tmp_path: Path, on_disk: bool) -> None:
    subjects = make_subjects(tmp_path, 2, 3)
    dataset = cached_subjects(subjects, load_subject_transforms(2), tmp_path / "cache" if on_disk else None)
    for _ in range(2):
        assert set(dataset[2]) == {"subject", "image"} and set(dataset[0]) == {"subject", "image", "label"}


def test_share_in_memory_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = make_subjects(tmp_path, 2, 2)
    reads = Reads(monkeypatch)
    dataset = cached_subjects(subjects, load_subject_transforms(2), cache_rate=0.5)
    assert len(reads.files) == 2
    for _ in range(2):
        assert_is_the_file(dataset[0]["image"], subjects[0]["image"], 2)
        assert_is_the_file(dataset[1]["image"], subjects[1]["image"], 2)
    assert len(reads.files) == 2 + 2 * 2
    for num_workers, threads in [(0, 1), (1, 1), (3, 3)]:
        dataset = cached_subjects(subjects, load_subject_transforms(2), num_workers=num_workers)
        # not one for each core of the machine
        assert isinstance(dataset, CacheDataset) and dataset.num_workers == threads


def test_bad_subject_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subjects = make_subjects(tmp_path, 2)
    Path(subjects[1]["image"]).unlink()
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(Exception, match=r"image1.nii.gz"):
        cached_subjects(subjects, load_subject_transforms(2))
    dataset = cached_subjects(subjects, load_subject_transforms(2), tmp_path / "cache")
    with pytest.raises(Exception, match=r"image1.nii.gz"):
        dataset[1]
    assert not list((tmp_path / "cache").iterdir())


def test_a_flipped_bit_of_a_cache_file_is_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subjects = make_subjects(tmp_path, 3)
    transform = load_subject_transforms(3)
    first = cached_subjects(subjects, transform, tmp_path / "cache")[0]["image"]
    (file,) = (tmp_path / "cache").iterdir()
    whole = bytearray(file.read_bytes())
    place = whole.find(first.numpy().tobytes())
    assert place > 0
    whole[place + 10] ^= 1
    file.write_bytes(whole)
    again = cached_subjects(subjects, transform, tmp_path / "cache")[0]["image"]
    assert torch.equal(again, first) and f"{file} is damaged and is made anew" in caplog.text
    assert load_checkpoint(file)["image"].shape == first.shape


def test_a_scan_that_has_changed_is_read_again(tmp_path: Path) -> None:
    subjects = make_subjects(tmp_path, 3)
    transform = load_subject_transforms(3)
    first = cached_subjects(subjects, transform, tmp_path / "cache")[0]["image"]
    image = nib.load(subjects[0]["image"])
    nib.save(nib.Nifti1Image(image.get_fdata()[::-1].astype(np.float32), image.affine), subjects[0]["image"])
    again = cached_subjects(subjects, transform, tmp_path / "cache")[0]["image"]
    assert torch.equal(again, first.flip(1)) and not torch.equal(again, first)


def test_threads_end_before_an_error_is_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subjects = make_subjects(tmp_path, 3, 6)
    for i in (1, 4):
        Path(subjects[i]["image"]).write_bytes(b"none")
    with pytest.raises(RuntimeError, match=r"image\d\.nii\.gz"):
        cached_subjects(subjects, load_subject_transforms(3), num_workers=3)
    assert "image1" in caplog.text or "image4" in caplog.text  # the other one
    assert not [thread for thread in threading.enumerate() if "Pool" in thread.name]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_bad_subject_costs_its_own_pairs(tmp_path: Path, on_disk: bool, caplog: pytest.LogCaptureFixture) -> None:
    subjects = make_subjects(tmp_path, 2, 4)
    Path(subjects[1]["image"]).write_bytes(b"none")
    cache = {"cache_dir": tmp_path / "cache" if on_disk else None, "num_workers": 2, "on_error": "skip"}
    pairs = cached_pairs(subjects, load_subject_transforms(2), cache)
    assert on_disk or "image1.nii.gz" in caplog.text  # while the others are still read
    for number in (0, 1):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"image1.nii.gz"):
                pairs[number]
    assert [pairs[number]["fixed_subject"] for number in (2, 3)] == [subjects[n]["subject"] for n in (2, 3)]


def test_another_file_in_the_place_of_a_cache_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = cached_subjects(make_subjects(tmp_path, 3), load_subject_transforms(3), tmp_path / "cache")
    first = dataset[0]["image"]
    (file,) = (tmp_path / "cache").iterdir()
    torch.save({"weights": torch.zeros(3)}, file)
    assert torch.equal(dataset[0]["image"], first) and f"{file} is damaged and is made anew" in caplog.text
