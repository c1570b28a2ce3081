# SPDX-License-Identifier: Apache-2.0
"""
Kill a small training of a bundle at random moments (SIGKILL, each third time SIGTERM), resume it each time, and compare
its files with those of one that was never stopped, byte by byte: ``python -m tests.fuzz.kills --kills 20 --seed 0``.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "oasis"
SETTINGS = {"max_epochs": 6, "pairs_per_epoch": 16, "batch_size": 2, "pooled": "true", "spatial_size": "[64,64]"}
SETTINGS |= {"max_steps": 4, "val_steps": 6, "resume": "true"}
FILES = ("last.pt", "model.pt")


def command(root: Path) -> list[str]:
    files = [str(BUNDLE / name) for name in ("train.json", "slices.json")]
    words = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "training", "--config_file", str(files)]
    for name, value in {**SETTINGS, "bundle_root": root}.items():
        words += [f"--{name}", str(value)]
    return words


def train(root: Path) -> float:
    """A training to its end; its seconds."""
    begin = time.perf_counter()
    done = subprocess.run(command(root), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the training failed: {done.stderr[-1500:]}")
    return time.perf_counter() - begin


def kill_often(root: Path, kills: int, seconds: float, rng: random.Random) -> int:
    """Start the training again and again, and kill it; the number of kills, fewer where it came to its end."""
    for done in range(kills):
        with open(root.with_suffix(".log"), "ab") as log:
            process = subprocess.Popen(command(root), stdout=log, stderr=log)
        number = signal.SIGTERM if done % 3 == 2 else signal.SIGKILL
        wait = rng.uniform(0.1 * seconds, seconds)
        try:
            code = process.wait(wait)
            if code:
                raise RuntimeError(f"ended by itself with {code}, see {root.with_suffix('.log')}")
            return done
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            code = process.wait(60)
        there = sorted(path.name for path in (root / "models").glob("*"))
        print(f"{done + 1}: {number.name} after {wait:.1f} s, exit code {code}, {there}", flush=True)
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    killed, rounds, different = 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole" / "run"
        seconds = train(whole)
        print(f"never stopped: {seconds:.1f} s", flush=True)
        while killed < given.kills:
            # the name of the folder is in the record of the training: the same for both
            part = Path(folder) / f"part{rounds}" / "run"
            part.parent.mkdir()
            killed += kill_often(part, min(given.kills - killed, 7), 0.75 * seconds, rng)
            train(part)
            rounds += 1
            for name in FILES:
                a, b = ((root / "models" / name).read_bytes() for root in (whole, part))
                different += a != b
                print(f"training {rounds}: {name} {'equal' if a == b else 'DIFFERENT'}", flush=True)
            if left := sorted(str(p.relative_to(part)) for p in part.rglob(".*") if p.is_file()):
                print(f"training {rounds}: left {left}", flush=True)
                different += 1
    print(f"{killed} kills in {rounds} trainings, {different} differences")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
