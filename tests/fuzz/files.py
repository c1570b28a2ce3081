# SPDX-License-Identifier: Apache-2.0
"""Damaged scans, transforms, checkpoints, caches and archives."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from monai_deq.data import StatePool, cached_subjects, download_dataset, image_dims, read_image
from monai_deq.networks import load_checkpoint, load_network
from monai_deq.transforms import CheckLabeld, load_subject_transforms, load_transform

from .damages import (
    FOREIGN,
    Rng,
    change_field,
    choose,
    cut,
    flip,
    read_nifti,
    spoil,
    write,
)
from .judging import Case, Check, Kind, placed, same
from .originals import MATRIX, SLICE, TRANSFORM_FILES, originals, tiny_network, training


@cache
def _bytes(name: str) -> bytes:
    return (originals() / name).read_bytes()


# -- scans


def _image(path: Path, label: bool = False) -> Any:
    return placed(read_image(path, "scan", label))


@cache
def _read(name: str) -> Any:
    return _image(originals() / name, "label" in name)


def _bits_of(name: str) -> Kind:
    def kind(rng: Rng, folder: Path) -> Case:
        content, what = flip(_bytes(name), rng)
        path = write(folder, name, content)
        return Case(what, lambda: _image(path, "label" in name), [path], same(_read(name)))

    return kind


def scan_spoilt(rng: Rng, folder: Path) -> Case:
    """Cut, overwritten or replaced; read as a scan is before a registration."""
    name = choose(rng, ("fixed.nii.gz", "volume.nii", "volume.nii.gz", "label.nii.gz"))
    content, what = spoil(_bytes(name), rng)
    path = write(folder, name, content)
    if name.endswith(".nii") and what.startswith("noise"):  # without a checksum noise is as good as voxels
        return Case(what, lambda: _image(path), [path], lambda got: _as_specified(got, content))
    load = load_subject_transforms(3 if "volume" in name else 2)
    item: dict[str, Any] = {"subject": "a", "image": str(path)}
    if "label" in name:
        item = {"subject": "a", "image": str(originals() / "fixed.nii.gz"), "label": str(path)}
    return Case(f"{name}: {what}", lambda: load(item), [path])


def _as_specified(got: Any, content: bytes) -> bool:
    want = read_nifti(content)
    if want is None:
        return False
    voxels, affine = want
    ours = got["voxels"]
    ours = np.moveaxis(ours, 0, -1) if len(ours) > 1 else ours[0]
    with np.errstate(all="ignore"):
        right = ours.size == voxels.size and np.allclose(
            ours.ravel(), voxels.astype(np.float32).ravel(), rtol=1e-5, equal_nan=True
        )
    if affine is None or not right:
        return bool(right)
    # a grid must have a place; of a slice the third axis says nothing
    axes = affine[:3, : got["voxels"].ndim - 1]
    regular = np.isfinite(affine).all() and np.linalg.det(axes.T @ axes) > 0
    return bool(regular and np.allclose(got["affine"], affine, rtol=1e-4, atol=1e-4))


def scan_header(rng: Rng, folder: Path) -> Case:
    """Other values in fields of the header: what it then says by the specification, or refused."""
    name = choose(rng, ("fixed.nii", "volume.nii"))
    content, what = change_field(_bytes(name), rng)
    if rng.random() < 0.2:
        content, more = change_field(content, rng)
        what = f"{what}, {more}"
    path = write(folder, name, content)

    def run() -> Any:
        image_dims(path, "scan")
        return _image(path)

    return Case(f"{name}: {what}", run, [path], lambda got: _as_specified(got, content))


def scan_voxels(rng: Rng, folder: Path) -> Case:
    """Voxels that no scan or label map can have, in a file that is whole."""
    whole: Any = nib.load(originals() / "fixed.nii.gz")  # type: ignore[attr-defined]
    array, affine = np.array(whole.dataobj, dtype=np.float32), np.array(whole.affine)
    place = tuple(int(rng.integers(n)) for n in array.shape)
    ways: dict[str, Any] = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "fraction": 1.5, "negative": -3}
    ways |= {"constant": None, "4-D": None, "colour": None, "complex": None, "one voxel wide": None, "huge": 1e19}
    ways |= {"other size": None, "elsewhere": None}
    way = choose(rng, ways)
    as_label = way in ("fraction", "negative", "huge", "other size", "elsewhere") or (
        way in ("nan", "inf", "-inf") and bool(rng.integers(2))
    )
    if as_label:
        array = np.array(nib.load(originals() / "label.nii.gz").dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    if ways[way] is not None:
        array[place] = ways[way]
    elif way == "constant":
        array[:] = rng.integers(-5, 5)
    elif way == "4-D":
        array = np.stack([array[..., None]] * 2, axis=-1)
    elif way == "colour":
        array = np.zeros(SLICE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    elif way == "complex":
        array = array.astype(np.complex64)
    elif way == "one voxel wide":
        array = array[:1]
    elif way == "other size":
        array = np.pad(array, ((0, 1), (0, 0)))
    else:
        affine[:3, 3] += 40 * affine[:3, 0]
    path = folder / "scan.nii.gz"
    nib.save(nib.Nifti1Image(array, affine), path)
    item = {"subject": "a", "image": str(path)}
    if as_label:
        item = {"subject": "a", "image": str(originals() / "fixed.nii.gz"), "label": str(path)}
    load = load_subject_transforms(2)
    what = f"{way} at {place}" + (" in a label map" if as_label else "")
    return Case(what, lambda: load(item), [path])


def scan_types(rng: Rng, folder: Path) -> Case:
    """Scans of any type of number, scaled or not, in any orientation, are read to the last digit."""
    shape = tuple(int(n) for n in rng.integers(2, 7, 3 if rng.random() < 0.6 else 2))
    kind = np.dtype(choose(rng, ("u1", "i1", "u2", "i2", "u4", "i4", "i8", "u8", "f4", "f8")))
    label = bool(rng.integers(2))
    high = min(np.iinfo(kind).max, 2**40) if kind.kind in "ui" else 1000
    array = rng.integers(0, high, shape, endpoint=True).astype(kind)
    affine = np.eye(4)
    affine[:3] = rng.normal(size=(3, 4)) * 3
    if abs(np.linalg.det(affine)) < 0.5:
        affine[:3, :3] += 5 * np.eye(3)
    end = choose(rng, (".nii", ".nii.gz"))
    image = nib.Nifti1Image(array, affine, dtype=kind)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=0, strip_shears=True)
    path = folder / f"scan{end}"
    nib.save(image, path)
    want = array.astype(np.float64)[None] if not label else array.astype(np.int64)[None]

    def right(got: Any) -> bool:
        exact = np.array_equal(got["voxels"].astype(np.int64), want) if label else None
        close = np.allclose(got["voxels"], want.astype(np.float32), rtol=0, atol=0) if not label else exact
        return bool(close and np.allclose(got["affine"], affine, rtol=1e-5, atol=1e-5))

    return Case(f"{kind} {shape} {end} label={label}", lambda: _image(path, label), [path], right, strict=True)


# -- transforms


def _parts(path: Path) -> list[Any]:
    return [placed(part) if isinstance(part, torch.Tensor) else np.asarray(part) for part in load_transform(path)]


@cache
def _transform(name: str) -> Any:
    return _parts(originals() / name)


def _body(name: str) -> int:
    """Where the numbers begin, which have a checksum: the header of MetaImage and NRRD has none."""
    content = _bytes(name)
    ends = {".mha": b"ElementDataFile = LOCAL\n", ".nrrd": b"\n\n"}.get(Path(name).suffix)
    return content.index(ends) + len(ends) if ends else 0


def transform_bits(rng: Rng, folder: Path) -> Case:
    name = choose(rng, ("field.nii.gz", "field.mha", "field.nrrd", "ddf.nii.gz"))
    content, what = flip(_bytes(name), rng, _body(name))
    path = write(folder, name, content)
    return Case(f"{name}: {what}", lambda: _parts(path), [path], same(_transform(name)))


def transform_spoilt(rng: Rng, folder: Path) -> Case:
    """Cut, or another file in its place: what is left of HDF5, .mat and NIfTI without a checksum is cut only."""
    name = choose(rng, TRANSFORM_FILES)
    if name.endswith((".h5", ".mat", ".nii", ".tfm", ".txt")):
        whole = _bytes(name)
        content, what = cut(whole, rng)
        if rng.random() < 0.4:
            other = choose(rng, FOREIGN)
            content, what = FOREIGN[other], f"{other} in its place"
        text = name.endswith((".tfm", ".txt")) and whole.startswith(content.rstrip())
        right = same(_transform(name)) if text else None
        if name.endswith(".h5"):  # what is behind the last object is padding
            right = same(_transform(name))
    else:
        content, what = spoil(_bytes(name), rng)
        right = same(_transform(name)) if "noise" in what else None  # in a field that nobody reads
    path = write(folder, name, content)
    return Case(f"{name}: {what}", lambda: _parts(path), [path], right)


def transform_text(rng: Rng, folder: Path) -> Case:
    """ITK's text files with other numbers, or what are none."""
    name = choose(rng, ("affine.tfm", "affine.txt"))
    lines = _bytes(name).decode().splitlines()
    row = int(rng.integers(3, 5))
    label, *numbers = lines[row].split()
    place = int(rng.integers(len(numbers)))
    way = choose(
        rng, ("nan", "inf", "-inf", "word", "gone", "more", "0.25", "1e999", "type", "no line", "1,5", "zeros")
    )
    right: Check | None = None
    if way == "gone":
        del numbers[place]
    elif way == "more":
        numbers.insert(place, "1.5")
    elif way == "zeros":
        numbers = ["0"] * len(numbers)
    elif way not in ("type", "no line"):
        numbers[place] = way
    lines[row] = " ".join([label, *numbers])
    if way == "type":
        lines[2] = choose(rng, ("Transform: BananaTransform_double_3_3", "Transform: AffineTransform_double_2_2"))
    if way == "no line":
        del lines[row]
    if way in ("0.25", "zeros"):
        right = same([_affine_of_text(lines)], close=1e-12)
    path = write(folder, name, "\n".join(lines).encode() + b"\n")
    return Case(f"{name}, line {row}, number {place}: {way}", lambda: _parts(path), [path], right)


def _affine_of_text(lines: list[str]) -> np.ndarray:
    """ITK's affine transform: ``y = A (x - c) + c + t`` in LPS."""
    numbers, centre = (np.array(lines[i].split()[1:], dtype=float) for i in (3, 4))
    matrix = np.eye(4)
    matrix[:3, :3] = numbers[:9].reshape(3, 3)
    matrix[:3, 3] = numbers[9:] + centre - matrix[:3, :3] @ centre
    flip_axes = np.diag([-1.0, -1.0, 1.0, 1.0])
    return flip_axes @ matrix @ flip_axes


def transform_header(rng: Rng, folder: Path) -> Case:
    """The header of MetaImage and NRRD: no place for the grid, other sizes, types, encodings."""
    name = choose(rng, ("field.mha", "field.nrrd"))
    start = _body(name)
    lines = _bytes(name)[:start].decode().splitlines()
    row = int(rng.integers(1 if name.endswith("nrrd") else 0, len(lines)))
    way = choose(rng, ("gone", "zeros", "nan", "banana", "minus", "huge"))
    numbers = {"zeros": "0", "nan": "nan", "banana": "banana", "huge": "987654321"}
    line = lines[row]
    if way == "gone":
        del lines[row]
    elif way == "minus":
        lines[row] = line.replace("= ", "= -").replace(": ", ": -")
    else:
        lines[row] = "".join(
            c if not c.isdigit() else numbers[way][0] if way in ("zeros", "huge") else "nan" for c in line
        )
    what = f"{name}: {line!r} -> {way}"
    content = "\n".join(lines).encode() + (b"\n\n" if name.endswith("nrrd") else b"\n") + _bytes(name)[start:]
    path = write(folder, name, content)
    changed = lines[row] if way != "gone" and row < len(lines) else ""

    def right(got: Any) -> bool:
        if changed == line or _harmless(line):
            return bool(same(_transform(name))(got))
        # a legal other place, direction or spacing: millimetres are the file's
        (part,), (whole,) = got, _transform(name)
        before, now = whole["affine"], part["affine"]
        moved = np.tensordot(now[:3, :3], part["voxels"].astype(float), axes=1)
        kept = np.tensordot(before[:3, :3], whole["voxels"].astype(float), axes=1)
        return bool(
            part["voxels"].shape == whole["voxels"].shape
            and abs(np.linalg.det(now[:3, :3])) > 1e-6
            and np.isfinite(now).all()
            and np.allclose(moved, kept, atol=1e-4)
        )

    return Case(what, lambda: _parts(path), [path], right)


def _harmless(line: str) -> bool:
    """Lines that say nothing on the numbers."""
    return line.startswith(("#", "ObjectType", "BinaryData ", "CenterOfRotation", "AnatomicalOrientation", "kinds:"))


# -- checkpoints


def checkpoint_bits(rng: Rng, folder: Path) -> Case:
    content, what = flip(_bytes("model.pt"), rng)
    path = write(folder, "model.pt", content)
    shutil.copy(originals() / "model.json", folder)
    return Case(what, lambda: dict(load_network(path).state_dict()), [path], same(dict(tiny_network().state_dict())))


def checkpoint_spoilt(rng: Rng, folder: Path) -> Case:
    content, what = spoil(_bytes("model.pt"), rng)
    if rng.random() < 0.3:
        content, what = choose(rng, (_other_zip("a.txt"), _other_zip("archive/data.pkl"))), "a zip of other content"
    path = write(folder, "model.pt", content)
    shutil.copy(originals() / "model.json", folder)
    return Case(what, lambda: load_network(path), [path])


def _other_zip(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "no weights")
    return file.getvalue()


def checkpoint_content(rng: Rng, folder: Path) -> Case:
    """Weights lacking, too many, of another shape, not finite, not numbers; or under other names that are known."""
    state: dict[str, Any] = dict(load_checkpoint(originals() / "model.pt")["network"])
    want, name = dict(state), choose(rng, state)
    weight = state[name]
    ways = ("lacks", "more", "renamed", "nan", "inf", "shape", "text", "complex", "list", "no dictionary", "empty")
    ways += ("prefix", "nested", "half", "double", "int keys", "none")
    way = choose(rng, ways)
    right, content = None, Any
    values = torch.full_like(weight, float("nan") if way == "nan" else float("inf"))
    mask = torch.rand(weight.shape) < 0.5
    mask.view(-1)[0] = True
    changed: dict[str, Any] = {"nan": torch.where(mask, values, weight), "inf": torch.where(mask, values, weight)}
    changed |= {"shape": weight.flatten()[:-1], "text": "banana", "complex": weight + 1j, "list": weight.tolist()}
    changed |= {"none": None}
    if way == "lacks":
        del state[name]
    elif way == "more":
        state["banana"] = torch.zeros(3)
    elif way == "renamed":
        state["banana." + name] = state.pop(name)
    elif way in changed:
        state[name] = changed[way]
    elif way in ("prefix", "nested", "half", "double"):
        right = same(want)
        if way == "prefix":
            state = {f"module.{k}": v for k, v in state.items()}
        elif way in ("half", "double"):
            kind = torch.float16 if way == "half" else torch.float64
            state = {k: v.to(kind) if v.is_floating_point() else v for k, v in state.items()}
            right = same({k: v.to(w.dtype) for (k, v), w in zip(state.items(), want.values(), strict=True)})
    content = {"network": state}
    content = {"a": {"b": state}} if way == "nested" else content
    content = {"network": dict(enumerate(state.values()))} if way == "int keys" else content
    content = list(state.values()) if way == "no dictionary" else {} if way == "empty" else content
    path = folder / "model.pt"
    torch.save(content, path)
    shutil.copy(originals() / "model.json", folder)
    return Case(f"{way}: {name}", lambda: dict(load_network(path).state_dict()), [path], right)


def _resumed(folder: Path, content: bytes) -> Path:
    target = folder / "training"
    shutil.copytree(originals() / "training", target)
    return write(target, "last.pt", content)


@cache
def _whole_training() -> dict[str, Any]:
    return training(originals() / "training", resume=True)


_TRAINED = ("training/*", "training/.lock")


def last_bits(rng: Rng, folder: Path) -> Case:
    """``last.pt`` of a training with a pool, resumed from."""
    content, what = flip((originals() / "training" / "last.pt").read_bytes(), rng)
    want, path = _whole_training(), _resumed(folder, content)
    return Case(what, lambda: training(path.parent, resume=True), [path], same(want))


def last_spoilt(rng: Rng, folder: Path) -> Case:
    content, what = spoil((originals() / "training" / "last.pt").read_bytes(), rng)
    path = _resumed(folder, content)
    return Case(what, lambda: training(path.parent, resume=True), [path])


def last_content(rng: Rng, folder: Path) -> Case:
    """Parts of ``last.pt`` lacking or of another kind, the pool too."""
    checkpoint: dict[str, Any] = dict(load_checkpoint(originals() / "training" / "last.pt"))
    path = originals() / "training" / "last.pt"
    pool = checkpoint["pool"]
    ways: dict[str, Any] = {f"no {key}": {k: v for k, v in checkpoint.items() if k != key} for key in checkpoint}
    ways |= {f"{key} = {v!r}": {**checkpoint, key: v} for key in checkpoint for v in (None, 3, "banana", [], {})}
    of_pool: dict[str, Any] = {"slots": {"tickets": torch.zeros(3), "states": pool["states"][:3]}}
    of_pool |= {"no states": {"tickets": pool["tickets"]}, "no tickets": {"states": pool["states"]}}
    of_pool |= {
        "fewer states": {**pool, "states": pool["states"][:2]},
        "size": {**pool, "states": torch.zeros(4, 2, 3)},
    }
    of_pool |= {"nan": {**pool, "states": pool["states"] * float("nan")}}
    ways |= {f"pool: {way}": {**checkpoint, "pool": content} for way, content in of_pool.items()}
    lacking = {k: {m: v for m, v in checkpoint["training"].items() if m != k} for k in checkpoint["training"]}
    ways |= {f"training without {k}": {**checkpoint, "training": v} for k, v in lacking.items()}
    what = choose(rng, ways)
    # these say nothing in a training without a running mean, without scaling and at its end
    idle = what.startswith(("averaged =", "scaler =")) or what.endswith(
        ("out pairs", "out best_metric", "out best_epoch")
    )
    path = _resumed(folder, b"")
    torch.save(ways[what], path)
    want = same(_whole_training()) if idle else None
    return Case(what, lambda: training(path.parent, resume=True), [path], want)


def pool_states(rng: Rng, folder: Path) -> Case:
    """Displacements that come into a pool which lies in a file: lost ones are let go, others kept to the last bit."""
    pool = StatePool(3, folder)
    fields = torch.from_numpy(rng.normal(size=(3, 2, 5, 6)).astype(np.float32))
    bad = [bool(rng.integers(2)) for _ in range(3)]
    for field, lost in zip(fields, bad, strict=True):
        if lost:
            field.view(-1)[int(rng.integers(60))] = choose(rng, (float("nan"), float("inf"), 1e6, float("-inf")))
    want = torch.stack([f if not lost else torch.zeros_like(f) for f, lost in zip(fields, bad, strict=True)])

    def run() -> torch.Tensor:
        pool.put([0, 1, 2], [4, 5, 6], fields)
        return pool.get([0, 1, 2], [4, 5, 6], torch.zeros(3, 1, 5, 6))

    return Case(f"lost {bad}", run, ["pool"], same(want), strict=True)


# -- caches


def _cache_file(bits: bool) -> Kind:
    """A file of a cache that is damaged is made anew, and gives what is read without a cache."""

    def kind(rng: Rng, folder: Path) -> Case:
        files = {"image": originals() / "fixed.nii.gz", "label": originals() / "label.nii.gz"}
        subject = {"subject": "a", **{key: str(file) for key, file in files.items()}}
        data = cached_subjects([subject], load_subject_transforms(2), folder / "cache")
        item = data[0]
        (file,) = (folder / "cache").iterdir()
        content, what = (flip if bits else spoil)(file.read_bytes(), rng)
        if not bits and rng.random() < 0.2:
            content, what = _bytes("model.pt"), "weights in its place"
        file.write_bytes(content)
        want = {key: placed(item[key]) for key in files}

        def run() -> Any:
            got = data[0]
            return {key: placed(got[key]) for key in files}

        return Case(what, run, [file], same(want), strict=True)

    return kind


# -- archives

_NAMES = ("OASIS_OAS1_0001_MR1/aligned_norm.nii.gz", "OASIS_OAS1_0002_MR1/aligned_norm.nii.gz", "subjects.txt")


def _archive(kind: str, members: dict[str, bytes], link: str | None = None) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
            if link is not None:
                entry = zipfile.ZipInfo("OASIS_OAS1_0001_MR1/link")
                entry.external_attr = 0xA1ED0000
                archive.writestr(entry, link)
        return file.getvalue()
    with tarfile.open(fileobj=file, mode="w:gz" if kind == "tar.gz" else "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if link is not None:
            member = tarfile.TarInfo("OASIS_OAS1_0001_MR1/link")
            member.type, member.linkname = (
                choose(np.random.default_rng(len(link)), (tarfile.SYMTYPE, tarfile.LNKTYPE)),
                link,
            )
            archive.addfile(member)
    return file.getvalue()


def archive(rng: Rng, folder: Path) -> Case:
    """Archives of a data set that are damaged, want to write elsewhere, or hold something else."""
    kind = choose(rng, ("zip", "tar", "tar.gz"))
    data = folder / "data"
    data.mkdir()
    members = {name: rng.bytes(300) for name in _NAMES}
    evil = str(choose(rng, ("../evil", "/tmp/fuzz-evil", "a/../../evil", "..", "OASIS_OAS1_0001_MR1/../../evil")))
    name = f"neurite.{kind}"
    way = choose(rng, ("whole", "nested", "escape", "link", "spoilt", "flip", "other", "nothing", "twice"))
    what, right, checksum = way, None, "skip"
    content = _archive(kind, members)
    made = ["data/neurite-oasis/**", "data/neurite-oasis/*", "data/neurite-oasis/*/*"]
    want = {name: zlib.crc32(part) for name, part in members.items()}
    if way in ("whole", "nested"):
        right = same(want)
        content = _archive(kind, {f"a/b/{n}": c for n, c in members.items()}) if way == "nested" else content
    elif way == "escape":
        content, what = _archive(kind, {**members, evil: b"evil"}), f"escapes to {evil}"
    elif way == "link":
        content, what = _archive(kind, members, evil), f"links to {evil}"
        # the one of a ZIP file becomes a file of its text
        right = same({**want, "OASIS_OAS1_0001_MR1/link": zlib.crc32(evil.encode())}) if kind == "zip" else None
    elif way == "spoilt":
        content, what = spoil(content, rng)
        if kind == "tar":  # no checksum of its own
            import hashlib

            checksum = hashlib.sha256(_archive(kind, members)).hexdigest()
        elif what.startswith("noise"):
            right = same(want)
    elif way == "flip":
        import hashlib

        checksum = hashlib.sha256(content).hexdigest() if kind == "tar" or rng.random() < 0.5 else checksum
        content, what = flip(content, rng)
        right = same(want) if checksum == "skip" else None
    elif way == "other":
        content = _archive(kind, {"readme.txt": b"no data"})
    elif way == "nothing":
        content = _archive(kind, {})
    path = write(data, name, content)

    def run() -> Any:
        for _ in range(2 if way == "twice" else 1):
            found = download_dataset(
                "neurite-oasis", data, True, f"http://localhost:9/{name}", checksum, progress=False
            )
        assert not Path("/tmp/fuzz-evil").exists() and not (folder / "evil").exists() and not (data / "evil").exists()
        return {str(p.relative_to(found)): zlib.crc32(p.read_bytes()) for p in found.rglob("*") if p.is_file()}

    right = same(want) if way == "twice" else right
    strict = way in ("whole", "nested", "twice")
    return Case(f"{kind}: {what}", run, [path, data / "neurite-oasis"], right, strict, made)


def check_label(rng: Rng, folder: Path) -> Case:
    """A label map of an image on another grid: refused where the grids differ, by more than a tenth of a voxel."""
    image = read_image(originals() / "fixed.nii.gz", "image")
    label = read_image(originals() / "label.nii.gz", "label", label=True)
    shift = float(rng.choice([0.0, 0.05, 0.2, 1.0, -3.0, 1e6]))
    label.affine[:3, 3] += shift * label.affine[:3, 0]
    return Case(
        f"shifted by {shift} voxels",
        lambda: CheckLabeld("label", "image")({"label": label, "image": image}) is not None,
        [originals() / "label.nii.gz"],
        (lambda got: True) if abs(shift) <= 0.1 else None,
        strict=abs(shift) <= 0.1,
    )


MATRIX_SHAPE = MATRIX.shape

KINDS: dict[str, tuple[Kind, float]] = {
    "image, one bit": (_bits_of("fixed.nii.gz"), 6),
    "volume, one bit": (_bits_of("volume.nii.gz"), 3),
    "label map, one bit": (_bits_of("label.nii.gz"), 6),
    "transform, one bit": (transform_bits, 8),
    "checkpoint, one bit": (checkpoint_bits, 6),
    "last.pt with a pool, one bit": (last_bits, 6),
    "scan, cut or replaced": (scan_spoilt, 8),
    "NIfTI header": (scan_header, 14),
    "voxels": (scan_voxels, 6),
    "types and affines": (scan_types, 5),
    "label map on another grid": (check_label, 1),
    "transform, cut or replaced": (transform_spoilt, 10),
    "transform, its text": (transform_text, 6),
    "transform, its header": (transform_header, 6),
    "checkpoint, cut or replaced": (checkpoint_spoilt, 4),
    "checkpoint, its content": (checkpoint_content, 5),
    "last.pt, cut or replaced": (last_spoilt, 3),
    "last.pt, its content": (last_content, 5),
    "states of a pool": (pool_states, 2),
    "cache file, one bit": (_cache_file(True), 6),
    "cache file, cut or replaced": (_cache_file(False), 3),
    "archive": (archive, 6),
}
