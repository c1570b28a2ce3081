# SPDX-License-Identifier: Apache-2.0
"""Damages to bytes, texts and values, and an own reading of NIfTI-1 by its specification."""

from __future__ import annotations

import copy
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator

#: what is found in the place of a file
FOREIGN: dict[str, bytes] = {
    "empty": b"",
    "text": b"this is no such file\n" * 20,
    "page": b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>",
    "zeros": bytes(5000),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "gzip of nothing": bytes.fromhex("1f8b080000000000000303000000000000000000"),
    "zip of nothing": b"PK\x05\x06" + bytes(18),
    "pickle": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x8c\x09echo evil\x85R.",
}
#: of values in JSON: nothing that is right for any field
WRONG: tuple[Any, ...] = (None, "", "banana", "$import os", -1, 0, 2.5, 1e300, True, [], {}, [[]], [None], {"a": 1})


def choose(rng: Rng, options: Any) -> Any:
    """One of a sequence, as it is."""
    options = list(options)
    return options[int(rng.integers(len(options)))]


def flip(content: bytes, rng: Rng, start: int = 0) -> tuple[bytes, str]:
    """One bit flipped, behind ``start``."""
    bit = int(rng.integers(8 * start, 8 * len(content)))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed), f"bit {bit}"


def cut(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """Cut off, at least one byte."""
    length = int(rng.integers(0, len(content)))
    return content[:length], f"cut to {length} of {len(content)} bytes"


def spoil(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """Cut off, a block overwritten, or another file in its place: nothing of which the content survives."""
    way = int(rng.integers(3))
    if way == 0:
        return cut(content, rng)
    if way == 1:
        name = choose(rng, FOREIGN)
        return FOREIGN[name], f"{name} in its place"
    length = max(len(content) // 4, 1)
    start = int(rng.integers(0, len(content) - length + 1))
    noise = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
    return content[:start] + noise + content[start + length :], f"noise at {start} over {length} bytes"


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value in a JSON document, the whole of it too."""
    yield here
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*here, key))


def get(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy of a document with another value at a place."""
    if not place:
        return new
    value = copy.deepcopy(value)
    get(value, place[:-1])[place[-1]] = new
    return value


def drop(value: Any, place: tuple[Any, ...]) -> Any:
    """A copy of a document without a place."""
    value = copy.deepcopy(value)
    del get(value, place[:-1])[place[-1]]
    return value


# -- NIfTI-1: https://nifti.nimh.nih.gov/nifti-1

#: offset and format of each field that matters
NIFTI = {
    **{"sizeof_hdr": (0, "i"), "datatype": (70, "h"), "bitpix": (72, "h"), "vox_offset": (108, "f")},
    **{"scl_slope": (112, "f"), "scl_inter": (116, "f"), "qform_code": (252, "h"), "sform_code": (254, "h")},
    **{f"dim{i}": (40 + 2 * i, "h") for i in range(8)},
    **{f"pixdim{i}": (76 + 4 * i, "f") for i in range(8)},
    **{f"quatern{i}": (256 + 4 * i, "f") for i in range(3)},
    **{f"qoffset{i}": (268 + 4 * i, "f") for i in range(3)},
    **{f"srow{i}{j}": (280 + 16 * i + 4 * j, "f") for i in range(3) for j in range(4)},
}
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_FLOATS = (0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), float("-inf"), 2.0, 0.5)
_SHORTS = (0, -1, 1, 2, 3, 4, 5, 7, 16, 64, 128, 1792, 512, 30000, 32767, -32768)


def set_field(content: bytes, name: str, value: float) -> bytes:
    offset, kind = NIFTI[name]
    changed = bytearray(content)
    struct.pack_into("<" + kind, changed, offset, value if kind == "f" else int(value))
    return bytes(changed)


def change_field(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """Another value in a field of the header."""
    name = choose(rng, NIFTI)
    value = choose(rng, _FLOATS if NIFTI[name][1] == "f" else _SHORTS)
    return set_field(content, name, value), f"{name} = {value}"


def read_nifti(content: bytes) -> tuple[np.ndarray, np.ndarray | None] | None:
    """
    Voxels, scaled, and the affine, of little-endian NIfTI-1; None where the specification gives them no meaning. The
    affine is None where the header has none.
    """
    h = {name: struct.unpack_from("<" + kind, content, offset)[0] for name, (offset, kind) in NIFTI.items()}
    # the size of the header says nothing more than the magic number
    if content[344:348] != b"n+1\0" or not 1 <= h["dim0"] <= 7:
        return None
    shape = [h[f"dim{i}"] for i in range(1, h["dim0"] + 1)]
    if min(shape) < 1 or h["datatype"] not in _TYPES:
        return None
    kind = np.dtype("<" + _TYPES[h["datatype"]])
    count, start = int(np.prod(shape, dtype=object)), h["vox_offset"]
    if start != start or not 352 <= start < len(content) or len(content) < int(start) + count * kind.itemsize:
        return None
    voxels = np.frombuffer(content, kind, count, int(start)).reshape(shape, order="F").astype(np.float64)
    slope, inter = h["scl_slope"], h["scl_inter"]
    if np.isfinite(slope) and slope != 0:
        if not np.isfinite(inter):
            return None
        voxels = voxels * slope + inter
    affine = np.eye(4)
    if h["sform_code"] > 0:
        affine[:3] = [[h[f"srow{i}{j}"] for j in range(4)] for i in range(3)]
    elif h["qform_code"] > 0:
        b, c, d = (h[f"quatern{i}"] for i in range(3))
        rest = 1.0 - (b * b + c * c + d * d)
        if not rest >= -1e-5:
            return None
        a = np.sqrt(max(rest, 0.0))
        rotation = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
            ]
        )
        # the sign of the first is qfac, spacings are positive
        spacing = [h[f"pixdim{i}"] for i in (1, 2, 3)]
        affine[:3, :3] = rotation * np.array(spacing) * [1, 1, -1 if h["pixdim0"] < 0 else 1]
        affine[:3, 3] = [h[f"qoffset{i}"] for i in range(3)]
    else:
        return voxels, None
    return voxels, affine


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name
