# SPDX-License-Identifier: Apache-2.0
"""The report of one registration."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from monai_deq.certificates import HARMLESS_CHANGES
from monai_deq.utils import json_ready
from monai_deq.visualize.pages import HTMLPage, data_uri, flattened, gray_jpeg, html_picture, html_table
from monai_deq.visualize.pairs import PLANES, OrientedPair, RegisteredPair, oriented
from monai_deq.visualize.panels import plot_checkerboard, plot_registration, plot_traces

__all__ = ["write_pair_report"]

#: entries of a summary: heading, factor, what the number means
_MEASURES: dict[str, tuple[str, float, str]] = {
    "similarity": ("Similarity", 1.0, "mean squared local correlation of the images, 0 to 1; higher is better"),
    "dice": ("Dice (%)", 100.0, "overlap of the labels, mean over those that both scans have; higher is better"),
    "overlap": ("Overlap (%)", 100.0, "overlap of the foreground at the start, Dice; low where scans are not aligned"),
    "hd95": ("HD95 (mm)", 1.0, "distance of the labels' surfaces, 95th percentile; lower is better"),
    "tre": ("TRE (mm)", 1.0, "target registration error: mean distance of corresponding landmarks; lower is better"),
    "folded_percent": ("Folded (%)", 1.0, "voxels where the map turns space inside out, |J| ≤ 0; 0 is best"),
    "std_log_jacobian": ("std log|J|", 1.0, "how unevenly the map stretches; lower is smoother"),
    "ndv_percent": ("NDV (%)", 1.0, "non-diffeomorphic volume, also of folds between voxels; 0 is best"),
}
#: entries of a record: what they mean
_RECORDED = {
    "verdict": "what became of the iteration",
    "converged": "whether a tolerance was met",
    "reason": "why the solver stopped",
    "steps": "evaluations of the map at full size",
    "coarse_steps": "the same at the smaller sizes, each half of the one before",
    "evaluations": "the cost of all steps, in steps at full size",
    "residual": "voxels that one more step would move the displacement, root of the mean square",
    "relative_residual": "the same as a share of the displacement",
    "spectral_radius": "below 1 the solution attracts what is near it, and by this factor a step",
    "start_distance": "voxels between this solution and that from a random start: near 0 where there is one alone",
    "sensitive_to": "harmless changes of the images that move the displacement by more than a voxel on the mean",
    **{f"answer_{name}_mean": "voxels" for name in HARMLESS_CHANGES},
    **{f"answer_{name}_max": "voxels" for name in HARMLESS_CHANGES},
    "energy": "dissimilarity and roughness together, which the method makes small",
    "slope": "how steeply the energy still falls, per voxel",
    "unfolded": "voxels whose displacement was changed to take folds away",
    "energy_before_unfolding": "the energy before that",
    "energy_unfolded": "the energy after that",
    "finish_steps": "steps of the second method that went on from the solution",
    "energy_before_finish": "the energy that it began from",
}
_VERDICTS = {
    "converged": "Converged: the displacement is at rest.",
    "unconfirmed": "Not confirmed: the solver met its tolerance, but the displacement is not at rest.",
    "step limit": "Stopped at the step limit: the displacement was still moving.",
    "cycling": "Not converged: the steps no longer get smaller.",
    "diverging": "Diverging: the steps grow. Do not use this result.",
    "non-finite": "Failed: the iteration gave numbers that are not finite. Do not use this result.",
}
#: slices of each plane that can be looked at, and pixels of their longer side
_MOST_SLICES, _PIXELS = 40, 256
_SCRIPT = """
const data = JSON.parse(document.getElementById("slices").textContent);
const names = ["fixed", "warped", "moving"], pick = (s) => document.querySelectorAll(s);
const screen_ = document.querySelector(".screen img"), slider = document.querySelector(".viewer input");
let plane = Object.keys(data)[0], image = "fixed", flicker = "", timer = 0;
function show() {
  const at = data[plane], i = Math.min(+slider.value, at.fixed.length - 1);
  slider.max = at.fixed.length - 1;
  screen_.src = at[image][i];
  screen_.alt = `${image} image, ${plane} slice ${i + 1} of ${at.fixed.length}`;
  document.querySelector(".viewer output").textContent = screen_.alt;
  "lrtb".split("").forEach((side, k) => { document.querySelector(".screen ." + side).textContent = at.letters[k]; });
  pick("[data-plane]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.plane === plane));
  pick("[data-image]").forEach((b) => b.setAttribute("aria-pressed", !flicker && b.dataset.image === image));
  pick("[data-flicker]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.flicker === flicker));
}
function blink(other) {
  clearInterval(timer);
  flicker = flicker === other ? "" : other;
  image = "fixed";
  if (flicker) timer = setInterval(() => { image = image === "fixed" ? flicker : "fixed"; show(); }, 600);
  show();
}
slider.addEventListener("input", show);
pick("[data-plane]").forEach((b) => b.addEventListener("click", () => {
  plane = b.dataset.plane; slider.max = data[plane].fixed.length - 1; slider.value = data[plane].start; show(); }));
pick("[data-image]").forEach((b) => b.addEventListener("click", () => { blink(""); image = b.dataset.image; show(); }));
pick("[data-flicker]").forEach((b) => b.addEventListener("click", () => blink(b.dataset.flicker)));
show();
"""


def write_pair_report(
    path: str | Path,
    pair: RegisteredPair,
    record: Mapping[str, Any],
    summary: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    files: Mapping[str | Path, tuple[str, str]] | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> None:
    """
    Write what a registration did as one HTML file of some MB, that needs no network: scores, figures, slices to go
    through, what the solver said, files and settings.

    Args:
        path: the file, ``.html``.
        pair: the pair.
        record: what :py:meth:`monai_deq.solvers.SolverRecord.item` gives, perhaps with a certificate's entries
            (``verdict``, ``spectral_radius``, ...) beside them.
        summary: scores by name, each a number or a tuple of before and after, ``dice_per_label`` a mapping of those by
            label; names that are not known here are shown as they are.
        settings: what the registration was run with; mappings inside are shown too. Defaults to none.
        files: by path of each file written what it is, and how it is used. Defaults to none.
        tolerance: residual at which a pair is at rest, for the figure. Defaults to ``None``: not drawn.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: When the file is there already.
        ImportError: When matplotlib is not installed.
        ValueError: When the suffix is another.
    """
    HTMLPage.check(path, overwrite)
    panels = plot_registration(pair)  # without matplotlib it ends here, before any work
    record = json_ready(record)
    page = HTMLPage(f"{pair.names[0]} registered to {pair.names[1]}")
    page.parts.append(_verdict(record, pair))
    page.add("Summary", _summary_table(summary))
    words = f"Fixed, moving and warped image, differences, deformation and Jacobian determinant of {page.title}"
    page.add("Images and field", html_picture(panels, words, 860), kind="whole")
    shown = oriented(pair)
    page.add("Slices", *_slices(shown), kind="viewer")
    words = "Checkerboards of fixed and moving, and of fixed and warped image"
    board = html_picture(plot_checkerboard(pair), words, 160 * len(shown.planes))
    page.add(
        "Checkerboard",
        "<p>Fixed and moving, then fixed and warped image in turn: edges that go on are aligned.</p>",
        board,
        kind="whole",
    )
    if any(value is not None for value in record.get("residual_trace") or ()):
        steps = plot_traces(record, tolerance=tolerance)
        page.add("Steps of the solver", html_picture(steps, "Residual and energy, step by step", 560), kind="whole")
    page.add("Certificate", _record_table(record))
    page.add("Regularity", _regularity_table(pair))
    labels = summary.get("dice_per_label") or {}
    rows = [(label, *(_times(v, 100.0) for v in _before_after(score))) for label, score in labels.items()]
    page.add("Dice of each label (%)", html_table(("label", "before", "after"), rows))
    beside = Path(path).absolute().parent
    rows = [((_relative(file, beside), ""), *words) for file, words in (files or {}).items()]
    page.add("Files", html_table((), rows))
    page.add("Settings", html_table((), list(flattened(settings or {}).items())))
    page.add_versions()
    page.write(path, overwrite)


def _relative(file: str | Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:  # on another drive
        return Path(file).name


def _before_after(value: Any) -> tuple[Any, Any]:
    before, after = value if isinstance(value, (tuple, list)) else (None, value)
    return before, after


def _times(value: Any, factor: float) -> Any:
    return value * factor if isinstance(value, float) else value


def _verdict(record: Mapping[str, Any], pair: RegisteredPair) -> str:
    """Green where the pair is at rest and nothing folds, amber else, and in words."""
    verdict = record.get("verdict") or ("converged" if record.get("converged") else record.get("reason"))
    words = _VERDICTS.get(str(verdict), f"Verdict: {verdict}." if verdict else "No verdict was recorded.")
    folds = int((pair.jacobian <= 0).sum())
    good = verdict == "converged" and not folds
    words += f" {folds} of {pair.jacobian.size} voxels fold." if folds else " No voxel folds."
    return f'<p class="badge {"good" if good else "doubt"}"><strong>{"✓" if good else "⚠"} {escape(words)}</strong></p>'


def _summary_table(summary: Mapping[str, Any]) -> str:
    rows = []
    for key, value in summary.items():
        if key != "dice_per_label":
            heading, factor, words = _MEASURES.get(key, (key, 1.0, ""))
            value = (value, None) if key == "overlap" else value
            rows.append(((heading, words), *(_times(v, factor) for v in _before_after(value))))
    return html_table(("", "before", "after"), rows)


def _record_table(record: Mapping[str, Any]) -> str:
    rows = []
    for prefix, run in (("", record), ("finish: ", record.get("finish") or {})):
        for key, words in _RECORDED.items():
            if key in run:
                value = run[key]
                shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
                rows.append(((f"{prefix}{key.replace('_', ' ')}", words), shown))
    return html_table(("", "value"), rows)


def _regularity_table(pair: RegisteredPair) -> str:
    jacobian = pair.jacobian
    low, middle, high = np.percentile(jacobian, (1, 50, 99))
    length = np.sqrt(sum((d * s) ** 2 for d, s in zip(pair.ddf, pair.spacing, strict=True)))
    rows = [
        (("smallest |J|", "at 0 or below the map folds"), float(jacobian.min())),
        (("|J|, 1st to 99th percentile", "1 keeps volume, 0.5 halves, 2 doubles it"), f"{low:.3g} to {high:.3g}"),
        (("median |J|", "of all voxels"), float(middle)),
        (("largest |J|", ""), float(jacobian.max())),
        (("mean displacement (mm)", "of all voxels"), float(length.mean())),
        (("largest displacement (mm)", ""), float(length.max())),
    ]
    return html_table(("", "value"), rows)


def _slices(shown: OrientedPair) -> tuple[str, ...]:
    """The slices of each plane, and what goes through them."""
    data: dict[str, Any] = {}
    for plane in shown.planes:
        axis, ends = PLANES[plane]
        box = shown.box[axis]
        indices = np.unique(np.linspace(box.start, box.stop - 1, min(box.stop - box.start, _MOST_SLICES)).round())
        width, height = shown.extent(plane)
        across, down = (max(1, round(_PIXELS * side / max(width, height))) for side in (width, height))
        data[plane] = {
            name: [data_uri(gray_jpeg(shown.cut(name, plane, int(i)), shown.window, (across, down))) for i in indices]
            for name in ("fixed", "warped", "moving")
        }
        data[plane] |= {"letters": ends, "start": int(np.abs(indices - shown.position[axis]).argmin())}
    first = data[shown.planes[0]]
    most, start = len(first["fixed"]) - 1, first["start"]

    def button(kind: str, name: str, text: str) -> str:
        return f'<button type="button" data-{kind}="{name}" aria-pressed="false">{text}</button>'

    planes = "".join(button("plane", name, name) for name in shown.planes)
    images = "".join(button("image", name, name) for name in ("fixed", "warped", "moving"))
    flickers = "".join(button("flicker", name, f"flicker: fixed and {name}") for name in ("warped", "moving"))
    sides = "".join(
        f'<span class="{side}">{letter}</span>' for side, letter in zip("lrtb", first["letters"], strict=True)
    )
    hidden = "" if most else " hidden"
    return (
        f'<div class="screen"><img src="{first["fixed"][start]}" alt="fixed image">{sides}</div>',
        "<p><output></output></p>",
        f'<label{hidden}>Slice <input type="range" min="0" max="{most}" value="{start}"></label>',
        f'<p role="group" aria-label="plane">{planes}</p>',
        f'<p role="group" aria-label="image">{images}</p>',
        f'<p role="group" aria-label="flicker">{flickers}</p>',
        f'<script type="application/json" id="slices">{json.dumps(data)}</script>',
        f"<script>{_SCRIPT}</script>",
    )
