# SPDX-License-Identifier: Apache-2.0
"""README's picture: ``python docs/figures/readme_figure.py``"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

import matplotlib
import torch
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from monai_deq.data import write_sample_cohort
from monai_deq.networks import load_network
from monai_deq.transforms import load_pair_transforms

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "bundles" / "oasis" / "models" / "slices" / "model.pt"
SIZE = (160, 192)
ROWS = (8, 152)  # where the head is


def draw(output: Path) -> None:
    """
    Register two subjects of the synthetic cohort and draw fixed, moving and warped image and the field.

    Args:
        output: PNG to write.
    """
    with tempfile.TemporaryDirectory() as folder:
        cohort = write_sample_cohort(
            Path(folder) / "cohort", num_subjects=2, spatial_size_3d=(16, 16, 24), spatial_size_2d=SIZE
        )
        files = (str(cohort / f"OASIS_OAS1_900{i}_MR1" / "slice_norm.nii.gz") for i in (1, 2))
        pair = load_pair_transforms(spatial_dims=2)(dict(zip(("fixed", "moving"), files, strict=True)))
        moving, fixed = (pair[key].as_tensor()[None] for key in ("moving", "fixed"))
    with torch.no_grad():
        warped, ddf = load_network(WEIGHTS)(moving, fixed)
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in fixed.shape[2:]), indexing="ij")
    across, down = (torch.stack(grid) + ddf[0]).numpy()

    figure, axes = plt.subplots(1, 4, figsize=(10, 2.75), layout="constrained", facecolor="white")
    brightest = float(fixed.max())
    for ax, (title, image) in zip(axes, {"fixed": fixed, "moving": moving, "warped": warped}.items(), strict=False):
        ax.imshow(image[0, 0].T, cmap="gray", vmin=0, vmax=brightest)
        ax.set_title(title)
    axes[3].imshow(fixed[0, 0].T, cmap="gray_r", vmin=0, vmax=2.5 * brightest)
    axes[3].plot(across[::6].T, down[::6].T, color="#d55e00", linewidth=0.8)
    axes[3].plot(across[:, ::6], down[:, ::6], color="#d55e00", linewidth=0.8)
    axes[3].set_title("displacement")
    for ax in axes:
        ax.set(xlim=(2, fixed.shape[2] - 3), ylim=(ROWS[1], ROWS[0]))
        ax.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    Image.open(buffer).convert("RGB").quantize(64).save(output, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("readme.png"))
