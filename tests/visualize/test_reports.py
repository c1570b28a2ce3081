# SPDX-License-Identifier: Apache-2.0
"""The report of a pair as a browser reads it."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from html_pages import Page
from scipy.ndimage import gaussian_filter

from monai_deq.visualize import RegisteredPair, write_pair_report

pytest.importorskip("matplotlib")

NAN = float("nan")
SIZE = (18, 20, 22)
RECORD: dict[str, Any] = {
    "steps": 3,
    "residual": 1e-4,
    "relative_residual": None,
    "converged": True,
    "reason": "tolerance",
    "coarse_steps": [40, 60],
    "residual_trace": [1.0, 0.1, 0.01],
}


def make_pair(size: tuple[int, ...] = SIZE, **kwargs: Any) -> RegisteredPair:
    rng = np.random.default_rng(0)
    images = {name: rng.random(size, dtype=np.float32) for name in ("fixed", "moving", "warped")}
    ddf = np.zeros((len(size), *size), dtype=np.float32)
    return RegisteredPair(**{**images, "ddf": ddf, "affine": np.diag([2.0, 3.0, 4.0, 1.0]), **kwargs})


def test_whole_report(tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.html"
    summary = {
        "dice": (2.5 / 3, 1.75 / 3),
        "tre": (6.291, 1.364),
        "folded_percent": 0.0,
        "overlap": 0.875,
        "own & only": 5,
    }
    big = 2**40 + 1
    summary["dice_per_label"] = {3: (0.5, 0.75), 7: (NAN, NAN), big: (1.0, 1.0)}
    settings = {"method": "energy", "solver": {"steps": [60, 40], "options": {}}}
    files = {path.parent / "sub" / "ddf.nii.gz": ("the field", "monai-deq warp")}
    write_pair_report(path, make_pair(), {**RECORD, "spectral_radius": 0.9}, summary, settings, files, tolerance=1e-3)
    page = Page(path)
    figures = 3
    # 18, 20 and 22 planes, all of them shown, of three images; and the first one
    assert page.check_alone() == figures + 1 + 3 * sum(SIZE)
    slices = page.slices()
    assert list(slices) == ["axial", "coronal", "sagittal"]
    assert [len(slices[p]["warped"]) for p in slices] == [22, 20, 18] and slices["sagittal"]["letters"] == "APSI"
    assert page.row("Dice (%)") == ["83.33", "58.33"] and page.row("TRE (mm)") == ["6.291", "1.364"]
    assert page.row("Overlap (%)") == ["87.50", "–"]  # of the start
    assert page.row("Folded (%)") == ["–", "0"] and page.row("own & only") == ["–", "5"]
    assert page.row("3") == ["50.00", "75.00"] and page.row("7") == ["–", "–"]
    assert page.row(str(big)) == ["100.0", "100.0"]
    assert page.row("coarse steps") == ["40, 60"] and page.row("relative residual") == ["–"]
    assert page.row("spectral radius") == ["0.9000"] and page.row("converged") == ["yes"]
    assert page.row("sub/ddf.nii.gz") == ["the field", "monai-deq warp"]
    assert page.row("solver.steps") == ["[60, 40]"] and page.row("solver.options") == ["{}"]
    assert page.row("largest displacement (mm)") == ["0"] and page.row("median |J|") == ["1.000"]
    assert {"torch", "monai", "numpy", "nibabel", "Python"} <= {row[0] for row in page.rows if row}
    assert "Converged" in page.words and str(tmp_path) not in page.source
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_the_slices_are_those_of_the_scan(tmp_path: Path) -> None:
    from PIL import Image

    size = (60, 16, 50)
    ramp = np.broadcast_to(np.linspace(0, 1, 50, dtype=np.float32), size).copy()
    path = tmp_path / "a.html"
    write_pair_report(path, make_pair(size, fixed=ramp, moving=ramp, warped=1 - ramp), RECORD, {})
    axial = Page(path).slices()["axial"]
    assert len(axial["fixed"]) == 40 == len(axial["moving"])  # of 50
    means = []
    for uri in axial["fixed"]:
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
            means.append(np.asarray(image).mean())
            assert image.size == (256, round(256 * 16 * 3 / (60 * 2)))  # mm: 120 by 48
    # from head to feet: the ramp rises to the head
    assert means == sorted(means, reverse=True) and means[0] > 230 and means[-1] < 30


@pytest.mark.parametrize(
    ("entries", "ddf", "kind", "words"),
    [
        ({}, 0.0, "good", "Converged: the displacement is at rest. No voxel folds."),
        ({"verdict": "converged"}, 2.0, "doubt", "of 7920 voxels fold"),
        ({"verdict": "unconfirmed"}, 0.0, "doubt", "Not confirmed"),
        ({"verdict": "step limit"}, 0.0, "doubt", "step limit"),
        ({"verdict": "diverging"}, 0.0, "doubt", "Do not use"),
        ({"converged": False, "reason": "non-finite"}, 0.0, "doubt", "not finite"),
        ({"converged": False, "reason": None}, 0.0, "doubt", "No verdict"),
    ],
)
def test_verdict_in_words(entries: dict[str, Any], ddf: float, kind: str, words: str, tmp_path: Path) -> None:
    field = np.zeros((3, *SIZE), dtype=np.float32)
    field[0, ::2] = ddf
    write_pair_report(tmp_path / "a.html", make_pair(ddf=field), {**RECORD, **entries}, {})
    page = Page(tmp_path / "a.html")
    (badge,) = [attributes["class"] for tag, attributes in page.tags if "badge" in (attributes.get("class") or "")]
    assert badge == f"badge {kind}" and words in page.words
    assert ("✓" in page.words) == (kind == "good")


def test_a_slice_without_labels_energy_or_steps(tmp_path: Path) -> None:
    write_pair_report(tmp_path / "a.html", make_pair((20, 23)), {"steps": 0, "residual_trace": []}, {})
    page = Page(tmp_path / "a.html")
    assert page.check_alone() == 2 + 1 + 3
    assert not {"Steps of the solver", "Dice of each label (%)", "Files", "Settings"} & set(page.headings())


def test_a_record_of_tensors(tmp_path: Path) -> None:
    """As the solver gives it, of one run and of a finish."""
    run = {**RECORD, "coarse_steps": torch.tensor([40, 60]), "residual_trace": torch.tensor([1.0, 0.1, 0.01, NAN])}
    record = {**run, "spectral_radius": NAN, "finish": {**run, "steps": 2}}
    write_pair_report(tmp_path / "a.html", make_pair((20, 23)), record, {})
    page = Page(tmp_path / "a.html")
    assert page.check_alone() == 3 + 1 + 3 and page.row("coarse steps") == ["40, 60"]
    assert page.row("spectral radius") == ["–"] and page.row("finish: steps") == ["2"]


@pytest.mark.filterwarnings("ignore:Glyph")  # the font of the figures has not all of them
def test_names_of_all_kinds(tmp_path: Path) -> None:
    nasty = "<b>\"a\" & 'b'</b></script>$x_{$ üß 脳"
    pair = make_pair((20, 23), names=(nasty, nasty))
    record = {**RECORD, "reason": nasty, "verdict": nasty}
    files = {tmp_path / "a&b.nii": (nasty, nasty)}
    summary = {nasty: (NAN, None), "dice_per_label": {nasty: 1.0}}
    write_pair_report(tmp_path / "a.html", pair, record, summary, {nasty: nasty}, files)
    page = Page(tmp_path / "a.html")
    page.check_alone()
    assert f"{nasty} registered to {nasty}" in page.words
    assert ["–", "–"] in [row[1:] for row in page.rows if row[0] == nasty]
    assert [nasty] in [row[1:] for row in page.rows if row[0] == nasty]
    assert page.row("a&b.nii") == [nasty, nasty] and page.row("reason") == [nasty]
    assert "b" not in {tag for tag, _ in page.tags}


def test_all_slices_take_a_few_megabytes(tmp_path: Path) -> None:
    # blurred noise has as much detail as tissue, without a background that takes nothing
    rng = np.random.default_rng(0)
    images = {name: gaussian_filter(rng.random((64, 72, 80)), 1.0) for name in ("fixed", "moving", "warped")}
    write_pair_report(tmp_path / "a.html", make_pair((64, 72, 80), **images), RECORD, {})
    assert Page(tmp_path / "a.html").check_alone() == 3 + 1 + 3 * 3 * 40
    assert (tmp_path / "a.html").stat().st_size < 8_000_000


def test_files_that_are_there_and_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.html"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"a\.html exists already"):
        write_pair_report(path, make_pair((20, 22)), RECORD, {})
    assert path.read_text() == "mine"
    write_pair_report(path, make_pair((20, 22)), RECORD, {}, overwrite=True)
    with pytest.raises(ValueError, match=r"expected a name that ends in \.html"):
        write_pair_report(tmp_path / "a.pdf", make_pair((20, 22)), RECORD, {})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "monai_deq\[figures\]"'):
        write_pair_report(tmp_path / "b.html", make_pair((20, 22)), RECORD, {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]
