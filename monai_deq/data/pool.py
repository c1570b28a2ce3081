# SPDX-License-Identifier: Apache-2.0
"""Pairs that are met again and again, and their displacements, for a training with persistent states."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.transforms import Randomizable
from torch.utils.data import Dataset, Sampler

from monai_deq.data.pairs import SEED_FACTOR, GivenPairDataset, PairDataset, PairSampler
from monai_deq.utils import gather_to_first, process_count, process_rank

__all__ = ["PooledDataset", "PooledIndex", "PooledSampler", "StatePool"]


def _checked_slots(slots: int) -> int:
    if int(slots) != slots or slots < 1:
        raise ValueError(f"slots must be a whole number of at least 1, got {slots}.")
    return int(slots)


class PooledIndex(NamedTuple):
    """A pair and where its state is kept, see :py:class:`StatePool`.

    Args:
        pair: what a :py:class:`PairSampler` draws: ``(fixed, moving)`` subject indices, or the index of a given pair.
        slot: slot of the pool.
        ticket: number that tells this visit of the slot from others.
    """

    pair: Any
    slot: int
    ticket: int


class PooledSampler(Sampler[PooledIndex]):
    """The pairs of another sampler, staying in a number of slots.

    Each draw takes a slot by chance; with the probability ``renewal`` its pair makes room for a fresh one. A pair is so
    trained on ``1 / renewal`` times in the mean; with a renewal of 1 the pairs are those of the other sampler. Draws
    depend on seed, epoch and rank alone, so that a resumed training goes on with the same pairs; each process has slots
    of its own.

    Args:
        sampler: :py:class:`RandomPairSampler` or :py:class:`GivenPairSampler`.
        slots: number of slots. Defaults to 32.
        renewal: probability of a fresh pair, in (0, 1]. Defaults to 0.1.
    """

    def __init__(self, sampler: PairSampler, slots: int = 32, renewal: float = 0.1) -> None:
        if not 0 < renewal <= 1:
            raise ValueError(f"renewal must be in (0, 1], got {renewal}.")
        self.sampler = sampler
        self.slots = _checked_slots(slots)
        self.renewal = renewal
        self.epoch = 1
        #: draws that the next iteration leaves out: an epoch that goes on in its middle
        self.skip = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose draws the next iteration gives; counts from 1, as Ignite does."""
        self.epoch = max(int(epoch), 1)

    def __iter__(self) -> Iterator[PooledIndex]:
        seed, rank, replicas = self.sampler.seed, self.sampler.rank, self.sampler.num_replicas
        held: dict[int, PooledIndex] = {}
        drawn: list[PooledIndex] = []
        tickets = 0
        for epoch in range(1, self.epoch + 1):
            pairs = self.sampler.draw(epoch)
            # another generator than that of the pairs, so that these are the same with any number of slots
            generator = torch.Generator().manual_seed(((seed * SEED_FACTOR + epoch) * SEED_FACTOR + rank + 1) % 2**63)
            slots = torch.randint(self.slots, (len(pairs),), generator=generator).tolist()
            renewed = (torch.rand(len(pairs), generator=generator) < self.renewal).tolist()
            drawn = []
            for pair, slot, fresh in zip(pairs, slots, renewed, strict=True):
                if fresh or slot not in held:
                    # no two processes have the same ticket: random starts are drawn by it
                    held[slot] = PooledIndex(pair, slot, tickets * replicas + rank)
                    tickets += 1
                drawn.append(held[slot])
        skip, self.skip = self.skip, 0
        return iter(drawn[skip:])

    def state_dict(self) -> dict[str, Any]:
        """What the draws depend on; the states of a pool mean nothing with other draws."""
        # starts: how often in a row each pair is drawn, which checkpoints tell
        return {"slots": self.slots, "starts": 1, "renewal": self.renewal, **self.sampler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make sure that a resumed training goes on with the draws that it began with (else ValueError)."""
        state = {"num_replicas": 1, "starts": 1, **state}  # which checkpoints need not say
        changed = {name: (state.get(name), own) for name, own in self.state_dict().items() if state.get(name) != own}
        if changed:
            words = ", ".join(f"{name} {was} (now {now})" for name, (was, now) in changed.items())
            raise ValueError(f"the pool was trained with {words}: resume with the same, or start over.")


class PooledDataset(Dataset):
    """A pair data set for the indices of a :py:class:`PooledSampler`; items have ``"slot"`` and ``"ticket"`` too.

    Args:
        dataset: the pairs.
        transform: random transform of a pair, one of MONAI's, such as a ``Compose``. Its draws depend on seed and
            ticket alone: a training that is resumed goes on as if it had not been stopped. Defaults to ``None``.
        seed: of the draws. Defaults to 0.
    """

    def __init__(
        self, dataset: PairDataset | GivenPairDataset, transform: Randomizable | None = None, seed: int = 0
    ) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, int(seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: PooledIndex) -> dict[str, Any]:
        if not isinstance(index, PooledIndex):
            raise TypeError(f"PooledDataset takes the indices of a PooledSampler, got {index!r}.")
        pair = self.dataset[index.pair]
        if self.transform is not None:
            self.transform.set_random_state(seed=(self.seed * SEED_FACTOR + index.ticket) % 2**32)
            pair = self.transform(pair)  # type: ignore[operator]
        return {**pair, "slot": index.slot, "ticket": index.ticket}


class StatePool:
    """Where the solver stands with each of a number of pairs.

    A training goes on from the displacement where a pair stood when it was last drawn, and writes back where it came
    to: the network is trained on states hundreds of steps old at the price of a few steps each time.

    A slot holds the displacement of one visit of one pair, known by its ``ticket``, a number that grows whenever the
    slot is given to another pair; one of an older ticket is neither handed out nor taken, so that a data loader may run
    ahead. The displacements are float32, one array of ``(slots, ndim, *spatial)`` in each process.

    Args:
        slots: number of slots, at least 1. Defaults to 32.
        folder: existing folder where the array lies in a nameless temporary file. Defaults to None: in memory.
    """

    def __init__(self, slots: int = 32, folder: str | Path | None = None) -> None:
        if folder is not None and not Path(folder).is_dir():
            raise NotADirectoryError(f"folder: expected an existing folder for the states of the pool, got {folder}.")
        self.slots = _checked_slots(slots)
        self.folder = None if folder is None else Path(folder)
        self.tickets = [-1] * self.slots
        self._states: torch.Tensor | None = None

    def __len__(self) -> int:
        """Number of slots that hold a displacement."""
        return sum(ticket >= 0 for ticket in self.tickets)

    def _allocate(self, shape: Sequence[int]) -> torch.Tensor:
        whole = (self.slots, *shape)
        if self.folder is None:
            return torch.zeros(whole)
        # the file loses its name here and is gone with the mapping, also when the process is killed
        with tempfile.TemporaryFile(dir=self.folder) as file:
            size = 4 * math.prod(whole)
            try:  # a file with holes would end the process where the disk is full
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as e:
                words = f"the states of the pool need {size / 1e6:.0f} MB in the folder {self.folder}: {e.strerror}."
                raise OSError(e.errno, f"{words} Make room, or take fewer slots.") from e
            return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="r+", shape=whole))

    def _visits(self, slots: Sequence[int], tickets: Sequence[int], ddf: torch.Tensor) -> list[tuple[int, int]]:
        """Slot and ticket of each field of a batch, checked."""
        if not len(slots) == len(tickets) == len(ddf):
            got = f"got {len(slots)} and {len(tickets)}"
            raise ValueError(f"a batch of {len(ddf)} needs as many slots and tickets, {got}.")
        visits = [(int(s), int(t)) for s, t in zip(slots, tickets, strict=True)]
        for slot, ticket in visits:
            if not 0 <= slot < self.slots or ticket < 0:
                raise ValueError(f"expected slots 0 to {self.slots - 1} and tickets from 0, got {slot} and {ticket}.")
        return visits

    def _states_for(self, ddf: torch.Tensor) -> torch.Tensor | None:
        """The displacements, where there are some, of the size of ``ddf``."""
        if self._states is not None and ddf.shape[1:] != self._states.shape[1:]:
            has, got = tuple(self._states.shape[1:]), tuple(ddf.shape[1:])
            raise ValueError(f"a pool keeps displacements of one size: it has {has}, got {got}.")
        return self._states

    def holds(self, slot: int, ticket: int) -> bool:
        """Whether there is a displacement of the pair with this slot and ticket."""
        return self._states is not None and self.tickets[slot] == ticket

    def get(self, slots: Sequence[int], tickets: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Where to go on from with a batch of pairs: ``(B, ndim, *spatial)`` in voxels, float32, zero for a new pair.

        Args:
            slots: slot of each pair.
            tickets: ticket of each pair.
            like: images of the pairs, ``(B, 1, *spatial)``, of the same size each time; the result is on their device.
        """
        ddf = torch.zeros((len(like), like.ndim - 2, *like.shape[2:]))
        for i, (slot, ticket) in enumerate(self._visits(slots, tickets, ddf)):
            if self.holds(slot, ticket) and (states := self._states_for(ddf)) is not None:
                ddf[i] = states[slot]
        return ddf.to(like.device)

    def put(self, slots: Sequence[int], tickets: Sequence[int], ddf: torch.Tensor) -> None:
        """Keep where a batch of pairs stands: ``ddf (B, ndim, *spatial)`` in voxels; the others as in :py:meth:`get`.

        One that is lost, not finite or with a displacement longer than the image, is let go: its pair starts anew.
        """
        visits = self._visits(slots, tickets, ddf)
        ddf = ddf.detach().to(device="cpu", dtype=torch.float32)
        states = self._states_for(ddf)
        if states is None:
            states = self._states = self._allocate(ddf.shape[1:])
        for state, (slot, ticket) in zip(ddf, visits, strict=True):
            if ticket < self.tickets[slot]:
                continue
            if float(state.abs().max()) <= max(state.shape[1:]):  # NaN compares false
                states[slot], self.tickets[slot] = state, ticket
            else:
                self.tickets[slot] = -1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training goes on with; displacements in a file are left out, as too large for a checkpoint.

        Of several processes all must call it, and the first one gets the slots of all, one behind the other.
        """
        tickets, states = torch.tensor([-1] * self.slots), torch.zeros(0)
        if self._states is not None and self.folder is None:
            tickets, states = torch.tensor(self.tickets), self._states
        parts = None if process_count() == 1 else gather_to_first((tickets, states))
        if parts is None:
            return {"tickets": tickets, "states": states}
        sizes = {part.shape[1:] for _, part in parts if len(part)}
        # a process that holds nothing yet has the slots nevertheless
        blocks = [part if len(part) else torch.zeros(self.slots, *size) for size in sizes for _, part in parts]
        return {"tickets": torch.cat([part for part, _ in parts]), "states": torch.cat(blocks) if blocks else states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what :py:meth:`state_dict` returned, of as many slots; each process takes its own."""
        tickets = [int(t) for t in state["tickets"]]
        if len(tickets) != (total := self.slots * process_count()):
            raise ValueError(f"the checkpoint has a pool of {len(tickets)} slots, this one has {total}.")
        states = state["states"]
        if len(states) and not (len(states) == total and states.ndim - 2 == states.shape[1] in (2, 3)):
            raise ValueError(f"the checkpoint has states {tuple(states.shape)} of {total} slots.")
        if not torch.isfinite(states).all():
            raise ValueError("the checkpoint has states that are not finite, NaN or infinity.")
        own = slice(process_rank() * self.slots, (process_rank() + 1) * self.slots)
        self.tickets, self._states = tickets[own], None
        if len(states):
            self._states = self._allocate(states.shape[1:])
            self._states.copy_(states[own])
