# SPDX-License-Identifier: Apache-2.0
"""SamplerEpochSetter: the pairs of an epoch are those that the sampler has for it, with worker processes too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader

from monai_deq.data import PairDataset, RandomPairSampler
from monai_deq.handlers import SamplerEpochSetter

SUBJECTS = 6
PAIRS = 5


def expected(epoch: int) -> list[tuple[str, str]]:
    sampler = RandomPairSampler(SUBJECTS, PAIRS, seed=11)
    sampler.set_epoch(epoch)
    return [(str(f), str(m)) for f, m in sampler]


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
@pytest.mark.parametrize("first", [1, 3])
def test_pairs_of_every_epoch(workers: dict[str, Any], first: int) -> None:
    subjects = [{"subject": str(i), "image": torch.zeros(1, 2, 2)} for i in range(SUBJECTS)]
    sampler = RandomPairSampler(SUBJECTS, PAIRS, seed=11)
    loader = DataLoader(PairDataset(subjects), sampler=sampler, batch_size=2, **workers)
    drawn: dict[int, list[tuple[str, str]]] = {}

    def iteration(engine: Engine, batch: dict[str, Any]) -> None:
        drawn.setdefault(engine.state.epoch, []).extend(
            zip(batch["fixed_subject"], batch["moving_subject"], strict=True)
        )

    engine = Engine(iteration)
    SamplerEpochSetter(sampler).attach(engine)

    @engine.on(Events.STARTED)
    def resume(engine: Engine) -> None:
        # as a checkpoint does
        engine.state.epoch, engine.state.iteration = first - 1, (first - 1) * len(loader)

    engine.run(loader, max_epochs=4)
    assert drawn == {epoch: expected(epoch) for epoch in range(first, 5)}
    assert expected(1) != expected(2) != expected(3) != expected(4)
