# SPDX-License-Identifier: Apache-2.0
"""README's picture: ``python docs/figures/readme_figure.py``"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from monai_deq.data import PairDataset, find_oasis, write_sample_cohort
from monai_deq.networks.blocks import warp_by_ddf
from monai_deq.networks.nets import EnergyRegistrationNet
from monai_deq.transforms import load_subject_transforms
from monai_deq.visualize import RegisteredPair, figure_png, plot_registration

SIZE = (160, 192)


def draw(output: Path) -> None:
    """
    Register two subjects of the synthetic cohort by descent on the energy and draw what that did.

    Args:
        output: PNG to write.
    """
    with tempfile.TemporaryDirectory() as folder:
        cohort = write_sample_cohort(
            Path(folder) / "cohort", num_subjects=2, spatial_size_3d=(16, 16, 24), spatial_size_2d=SIZE
        )
        load = load_subject_transforms(spatial_dims=2)
        item = PairDataset([load(subject) for subject in find_oasis(cohort, 2).subjects])[0]
    moving, fixed, labels = (item[key].as_tensor()[None] for key in ("moving", "fixed", "moving_label"))
    warped, ddf = EnergyRegistrationNet(spatial_dims=2).eval()(moving, fixed)
    item.update(warped=warped[0], ddf=ddf[0], warped_label=warp_by_ddf(labels, ddf, "nearest")[0])
    item.update(moving_subject="synthetic head 9002", fixed_subject="synthetic head 9001")
    figure = plot_registration(RegisteredPair.from_item(item))
    picture = Image.open(io.BytesIO(figure_png(figure, dpi=110))).convert("RGB")
    picture.quantize(255, dither=Image.Dither.NONE).save(output, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("readme.png"))
