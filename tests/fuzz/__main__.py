# SPDX-License-Identifier: Apache-2.0
"""Damage files and command lines: ``python -m tests.fuzz --cases 10000 --seed 0``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.judging import run_cases, table
from fuzz.kinds import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10000, help="number of cases")
    parser.add_argument("--seed", type=int, default=0, help="of the damages")
    parser.add_argument("--kind", help="kinds with this in their name alone")
    parser.add_argument("--case", type=int, help="the number of the only case")
    given = parser.parse_args()
    kinds = {name: of for name, of in KINDS.items() if not given.kind or given.kind in name}
    begin = time.perf_counter()
    outcomes = run_cases(kinds, given.cases, given.seed, given.case)
    others = [o for o in outcomes if o.outcome == "other"]
    for o in others if given.case is None else outcomes:
        print(f"{o.kind} {o.number}: {o.what}: {o.outcome}: {o.said}\n")
    print(table(outcomes))
    print(f"{len(outcomes)} cases in {time.perf_counter() - begin:.0f} s, {len(others)} other")
    return int(bool(others))


if __name__ == "__main__":
    sys.exit(main())
