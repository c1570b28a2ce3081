# SPDX-License-Identifier: Apache-2.0
"""What a network's solution is worth as a start of the energy's descent:
``python docs/figures/energy_start.py DATA docs/results/energy_start.png``, DATA being the neurite-OASIS folder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from monai.bundle import ConfigParser

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from monai_deq.engines import PreparePairBatch
from monai_deq.metrics import compute_label_dice
from monai_deq.networks import load_network
from monai_deq.networks.blocks import warp_by_ddf
from monai_deq.networks.nets import EnergyRegistrationNet, RegistrationNet
from monai_deq.networks.nets.iteration import initial_state

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "oasis"
#: title: configuration, weights, further settings, steps at full size
SETS = {
    "44 slice pairs": (["slices.json"], "models/slices/model.pt", {}, 60),
    "0002 to 0001 at 80 x 96 x 112": (
        [],
        "models/model.pt",
        {"split_lists": {"training": [133, 244], "validation": [1, 2], "test": [1, 2]}},
        60,
    ),
}


def descent(
    energy: EnergyRegistrationNet,
    network: RegistrationNet | None,
    moving: torch.Tensor,
    fixed: torch.Tensor,
    labels: tuple[torch.Tensor, torch.Tensor, list[int]],
    steps: int,
) -> Iterator[tuple[float, float, float]]:
    """Seconds, energy and Dice before each step at full size, from the smaller sizes or from a network's solution."""
    ndim, begin = fixed.ndim - 2, time.perf_counter()
    if network is None:
        ddf, _ = energy.solve(moving, fixed, max_steps=1)
    else:
        ddf, _ = network.solve(moving, fixed, name="anderson", tolerance=0.005)
    g, state = energy.fixed_point_map(moving, fixed), initial_state(fixed, ddf, energy.hidden_channels)
    seconds = time.perf_counter() - begin
    for _ in range(steps):
        begin, ddf, state = time.perf_counter(), state[:, :ndim], g(state)
        of_step = time.perf_counter() - begin
        warped = warp_by_ddf(labels[0], ddf, mode="nearest")
        dice = compute_label_dice(warped, labels[1], labels[2], labels[0]).nanmean()
        yield seconds, float(energy.update.measured(state[:, ndim:])[0]), float(dice)
        seconds += of_step


@torch.no_grad()
def curves(data: Path, title: str) -> pd.DataFrame:
    """Means over the pairs of a set: ``start``, ``step``, ``seconds``, ``energy``, ``dice``."""
    overlays, weights, settings, steps = SETS[title]
    config = ConfigParser()
    config.read_config([str(BUNDLE / name) for name in ("evaluate.json", *overlays)])
    config.update({"dataset_dir": str(data), "ckpt_path": str(BUNDLE / weights), **settings})
    network = load_network(BUNDLE / weights, coarse_solver="anderson", coarse_tolerance=0.005)
    dims = config.get_parsed_content("spatial_dims")
    energy, numbers = EnergyRegistrationNet(spatial_dims=dims).eval(), list(config.get_parsed_content("labels"))
    rows = []
    for batch in config.get_parsed_content("dataloader"):
        moving, _, (fixed,), _ = PreparePairBatch()(batch, torch.device("cpu"))
        labels = (torch.as_tensor(batch["moving_label"]), torch.as_tensor(batch["fixed_label"]), numbers)
        for start, net in {"from zero": None, "from the network": network}.items():
            found = descent(energy, net, moving, fixed, labels, steps)
            rows += [(start, step, *values) for step, values in enumerate(found)]
        if dims == 3:
            break
    frame = pd.DataFrame(rows, columns=["start", "step", "seconds", "energy", "dice"])
    return frame.groupby(["start", "step"], as_index=False).mean()


def main() -> None:
    """Measure, draw, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    figure, axes = plt.subplots(2, len(SETS), figsize=(8, 5), layout="constrained", facecolor="white")
    for column, title in zip(axes.T, SETS, strict=True):
        frame = curves(arguments.data, title)
        print(title, frame[frame["step"].isin([0, 10, 20, 40, 59])].round(4).to_string(index=False), sep="\n")
        for (start, of_start), colour in zip(frame.groupby("start"), ("#0072b2", "#d55e00"), strict=True):
            for axis, key in zip(column, ("energy", "dice"), strict=True):
                axis.plot(of_start["seconds"], of_start[key], color=colour, label=start, linewidth=1.4)
                axis.set_ylabel(key.capitalize(), fontsize=8)
                axis.tick_params(labelsize=8)
                axis.spines[["top", "right"]].set_visible(False)
        column[0].set_title(title, fontsize=9)
        column[1].set_xlabel("seconds a pair", fontsize=8)
        low = np.nanmin(frame["energy"])
        column[0].set_ylim(low - 0.01, low + 0.15)
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.savefig(arguments.output, dpi=100)


if __name__ == "__main__":
    main()
