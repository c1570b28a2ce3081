# SPDX-License-Identifier: Apache-2.0
"""Displacements that persist from one training iteration to the next."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_deq.utils import gather_to_first, process_count, process_rank

__all__ = ["StatePool"]


class StatePool:
    """
    Where the solver stands with each of a number of pairs.

    A training that always starts from zero sees the first steps of the iteration only. With a pool it draws pairs that
    it has met before, goes on from the displacement where their iteration stood, and writes back where it came to: the
    network is trained on states hundreds of steps old at the price of a few steps each time.

    The pool has numbered slots. A slot holds the displacement of one visit of one pair, known by its ``ticket``, a
    number that grows whenever the slot is given to another pair; a displacement of an older ticket is neither handed
    out nor taken. So it does not matter how far a data loader with workers runs ahead. Each process keeps its own pool;
    a checkpoint has those of all processes, one behind the other.

    The displacements are float32, one array of ``(slots, ndim, *spatial)`` that never grows, in memory or in a nameless
    temporary file in a folder of choice.

    Args:
        slots: number of slots. Defaults to 32.
        folder: folder of the file; it must exist. Defaults to ``None``: in memory.

    Raises:
        ValueError: When ``slots`` is below 1.
        NotADirectoryError: When there is no such folder.
    """

    def __init__(self, slots: int = 32, folder: str | Path | None = None) -> None:
        if int(slots) != slots or slots < 1:
            raise ValueError(f"slots must be a whole number of at least 1, got {slots}.")
        if folder is not None and not Path(folder).is_dir():
            raise NotADirectoryError(f"folder: expected an existing folder for the states of the pool, got {folder}.")
        self.slots = int(slots)
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
            return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="w+", shape=whole))

    def _check(self, slots: Sequence[int], tickets: Sequence[int], batch: int) -> list[tuple[int, int]]:
        if not len(slots) == len(tickets) == batch:
            raise ValueError(
                f"a batch of {batch} needs as many slots and tickets, got {len(slots)} and {len(tickets)}."
            )
        pairs = [(int(s), int(t)) for s, t in zip(slots, tickets, strict=True)]
        for slot, ticket in pairs:
            if not 0 <= slot < self.slots or ticket < 0:
                raise ValueError(f"expected slots 0 to {self.slots - 1} and tickets from 0, got {slot} and {ticket}.")
        return pairs

    def holds(self, slot: int, ticket: int) -> bool:
        """
        Whether there is a displacement of a pair.

        Args:
            slot: its slot.
            ticket: its ticket.
        """
        return self._states is not None and self.tickets[slot] == ticket

    def get(self, slots: Sequence[int], tickets: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """
        Where to go on from with a batch of pairs.

        Args:
            slots: slot of each pair.
            tickets: ticket of each pair.
            like: images of the pairs, ``(B, 1, *spatial)``.

        Returns:
            ``(B, ndim, *spatial)`` in voxels, float32, on the device of the images; zero for a pair that is new.

        Raises:
            ValueError: When a number is out of its range, or the images have another size than those before.
        """
        ddf = torch.zeros((len(like), like.ndim - 2, *like.shape[2:]))
        for i, (slot, ticket) in enumerate(self._check(slots, tickets, len(like))):
            if self._states is not None and self.holds(slot, ticket):
                self._check_shape(ddf)
                ddf[i] = self._states[slot]
        return ddf.to(like.device)

    def put(self, slots: Sequence[int], tickets: Sequence[int], ddf: torch.Tensor) -> None:
        """
        Keep where a batch of pairs stands. One that is lost, not finite or with a displacement longer than the image,
        is let go: its pair starts anew when it is next met.

        Args:
            slots: slot of each pair.
            tickets: ticket of each pair.
            ddf: ``(B, ndim, *spatial)`` in voxels.

        Raises:
            ValueError: When a number is out of its range, or the fields have another size than those before.
        """
        visits = self._check(slots, tickets, len(ddf))
        ddf = ddf.detach().to(device="cpu", dtype=torch.float32)
        if self._states is None:
            self._states = self._allocate(ddf.shape[1:])
        self._check_shape(ddf)
        for state, (slot, ticket) in zip(ddf, visits, strict=True):
            if ticket < self.tickets[slot]:
                continue
            # NaN compares false
            if float(state.abs().max()) <= max(state.shape[1:]):
                self._states[slot], self.tickets[slot] = state, ticket
            else:
                self.tickets[slot] = -1

    def _check_shape(self, ddf: torch.Tensor) -> None:
        if self._states is not None and ddf.shape[1:] != self._states.shape[1:]:
            raise ValueError(
                "a pool keeps displacements of one size: it has "
                f"{tuple(self._states.shape[1:])}, got {tuple(ddf.shape[1:])}."
            )

    def state_dict(self) -> dict[str, Any]:
        """
        What a resumed training goes on with. Displacements in a file are left out: they are too large for a
        checkpoint, and their pairs start anew. Of several processes all must call it, and the first one gets the slots
        of all, those of the others behind its own.
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
        return {
            "tickets": torch.cat([part for part, _ in parts]),
            "states": torch.cat(blocks) if blocks else states,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Args:
            state: what :py:meth:`state_dict` returned; of several processes each takes its own slots.

        Raises:
            ValueError: When the number of slots, over all processes, is another.
        """
        tickets = [int(t) for t in state["tickets"]]
        total = self.slots * process_count()
        if len(tickets) != total:
            raise ValueError(f"the checkpoint has a pool of {len(tickets)} slots, this one has {total}.")
        own = slice(process_rank() * self.slots, (process_rank() + 1) * self.slots)
        self.tickets, self._states = tickets[own], None
        if len(state["states"]):
            self._states = self._allocate(state["states"].shape[1:])
            self._states.copy_(state["states"][own])
