# SPDX-License-Identifier: Apache-2.0
"""What MONAI's engines need to know about pairs of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents, PrepareBatch

from monai_deq.data import StatePool
from monai_deq.solvers import random_smooth_ddf
from monai_deq.utils import process_count

__all__ = ["PreparePairBatch", "PreparePooledPairBatch", "RegistrationEvaluator"]


class PreparePairBatch(PrepareBatch):
    """
    Split a batch of pairs into what a registration network takes, ``network(moving, fixed)``, or
    ``network(moving, fixed, initial_ddf)`` where the batch has displacements to start from, and what the loss
    compares with, ``{"moving": ..., "fixed": ...}``. Images and displacements become plain tensors.

    Args:
        moving_key: key of the moving images. Defaults to ``"moving"``.
        fixed_key: key of the fixed images. Defaults to ``"fixed"``.
        initial_ddf_key: key of the displacements to start from. Defaults to ``"initial_ddf"``.
        target_keys: keys of what else the loss compares with, put beside the images under the same names: tensors or
            lists of tensors, e.g. masks and keypoints. Defaults to none.
    """

    def __init__(
        self,
        moving_key: str = "moving",
        fixed_key: str = "fixed",
        initial_ddf_key: str = "initial_ddf",
        target_keys: Sequence[str] = (),
    ) -> None:
        self.moving_key = moving_key
        self.fixed_key = fixed_key
        self.initial_ddf_key = initial_ddf_key
        self.target_keys = tuple(target_keys)

    def __call__(
        self,
        batchdata: dict[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any], tuple[torch.Tensor, ...], dict[str, Any]]:
        """Return ``(moving, target, (fixed,), {})`` or ``(moving, target, (fixed, initial_ddf), {})``."""

        def plain(image: Any) -> Any:
            if isinstance(image, (list, tuple)):
                return [plain(part) for part in image]
            image = image.as_tensor() if hasattr(image, "as_tensor") else image
            return image.to(device=device, non_blocking=non_blocking, **kwargs)

        absent = [key for key in self.target_keys if key not in batchdata]
        if absent:
            raise KeyError(f"target_keys: the batch has no {absent}, it has {sorted(batchdata)}.")
        moving, fixed = plain(batchdata[self.moving_key]), plain(batchdata[self.fixed_key])
        start = (plain(batchdata[self.initial_ddf_key]),) if self.initial_ddf_key in batchdata else ()
        target = {key: plain(batchdata[key]) for key in self.target_keys}
        return moving, {**target, "moving": moving, "fixed": fixed}, (fixed, *start), {}


class PreparePooledPairBatch(PreparePairBatch):
    """
    :py:class:`PreparePairBatch` for pairs that go on from where they stand: the network is called as
    ``network(moving, fixed, initial_ddf)``. Where all pairs of the batch are new and start from zero it is called as
    ``network(moving, fixed)``, so that a network with coarser levels begins at these; in a batch with others, new ones
    start from the ``network``'s ``coarse_solution``. With a proximal term the solutions of the coarser levels are
    needed each time a pair is met: they are kept as the displacements are, and given to network and loss as
    ``proximal_center``.

    Args:
        pool: where the displacements are kept; :py:class:`monai_deq.handlers.StatePoolUpdater` writes them back.
        moving_key: key of the moving images. Defaults to ``"moving"``.
        fixed_key: key of the fixed images. Defaults to ``"fixed"``.
        random_share: share of the pairs new to the pool that start from a random smooth displacement, the others from
            zero. Defaults to 0.
        random_rms: their largest RMS length in voxels; it is drawn uniformly. Defaults to 3.
        random_smoothness: their smoothness, see :py:func:`monai_deq.solvers.random_smooth_ddf`. Defaults to 8.
        random_steps: smallest and largest number of steps of an iteration, drawn uniformly for each batch and given to
            the network as ``max_steps``; above its ``num_states``. Defaults to ``None``: the network's own.
        network: the network that is trained, asked for its ``coarse_solution`` if it has one, and for its
            ``proximal_weight`` and ``num_states``. Defaults to ``None``: new pairs in a batch with others start from
            zero.
        target_keys: see :py:class:`PreparePairBatch`. Defaults to none.
        seed: of the random starts. Defaults to 0.

    Raises:
        ValueError: When a number is out of its range.
    """

    def __init__(
        self,
        pool: StatePool,
        moving_key: str = "moving",
        fixed_key: str = "fixed",
        random_share: float = 0.0,
        random_rms: float = 3.0,
        random_smoothness: float = 8.0,
        random_steps: Sequence[int] | None = None,
        network: nn.Module | None = None,
        target_keys: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(moving_key, fixed_key, target_keys=target_keys)
        if not 0 <= random_share <= 1:
            raise ValueError(f"random_share must be in [0, 1], got {random_share}.")
        if not (random_rms >= 0 and random_smoothness > 0):
            raise ValueError(
                "random_rms must not be negative and random_smoothness above 0, got "
                f"{random_rms} and {random_smoothness}."
            )
        if random_steps is not None and not (len(random_steps) == 2 and 1 <= random_steps[0] <= random_steps[1]):
            raise ValueError(f"random_steps must be the smallest and the largest number of steps, got {random_steps}.")
        network = getattr(network, "module", network)
        states = int(getattr(network, "num_states", 0))
        if random_steps is not None and random_steps[0] <= states:
            raise ValueError(
                f"random_steps must be above the {states} intermediate states of the network (num_states), got "
                f"{random_steps}."
            )
        self.pool = pool
        self.random_steps = random_steps
        self.random_share = random_share
        self.random_rms = random_rms
        self.random_smoothness = random_smoothness
        self.seed = int(seed)
        self.coarse_solution = getattr(network, "coarse_solution", None)
        # solved for again, not read from a checkpoint, after a training was resumed
        pulled = bool(getattr(network, "proximal_weight", 0.0)) and getattr(network, "coarse", None) is not None
        self.centers = StatePool(pool.slots, pool.folder) if pulled else None

    def __call__(  # type: ignore[override]
        self,
        batchdata: dict[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any], tuple[torch.Tensor, ...], dict[str, Any]]:
        """
        Return ``(moving, target, (fixed[, initial_ddf]), settings)``, the settings those of the network's ``forward``:
        none, a number of steps, or what a proximal term pulls to.
        """
        moving, target, (fixed, *_), settings = super().__call__(batchdata, device, non_blocking, **kwargs)
        absent = [key for key in ("slot", "ticket") if key not in batchdata]
        if absent:
            raise KeyError(f"a pooled batch needs {absent}: use PooledPairDataset with a PooledPairSampler.")
        slots, tickets = batchdata["slot"].tolist(), batchdata["ticket"].tolist()
        met = [self.pool.holds(*visit) for visit in zip(slots, tickets, strict=True)]
        ddf = self.pool.get(slots, tickets, fixed)
        centers = None if self.centers is None else self._proximal_centers(slots, tickets, moving, fixed)
        for i, (ticket, known) in enumerate(zip(tickets, met, strict=True)):
            # the draws depend on seed and ticket alone, so that a resumed training makes the same
            key = self._key(ticket)
            chance, length = torch.rand(2, generator=torch.Generator().manual_seed(key)).tolist()
            if not known and chance < self.random_share:
                shape = (1, *ddf.shape[1:])
                rms = self.random_rms * length
                ddf[i : i + 1] = random_smooth_ddf(shape, rms, self.random_smoothness, key, ddf.device)
                met[i] = True
        new = [i for i, known in enumerate(met) if not known]
        if centers is not None:
            ddf[new] = centers[new]
            target, settings = {**target, "proximal_center": centers}, {**settings, "proximal_center": centers}
            met = [True] * len(met)
        elif new and len(new) < len(met) and self.coarse_solution is not None:
            start = self.coarse_solution(moving[new], fixed[new])
            if start is not None:
                ddf[new] = start.to(ddf)
        if self.random_steps is not None:
            low, high = (int(n) for n in self.random_steps)
            settings = {**settings, "max_steps": int(torch.randint(low, high + 1, (1,)))}
        return moving, target, (fixed, ddf) if any(met) else (fixed,), settings

    def _key(self, ticket: int) -> int:
        """Seed of what is drawn for a ticket; seeds lie far apart in the 32 bits that PyTorch's generator looks at."""
        return (self.seed * 0x9E3779B1 + ticket) % 2**32

    def _proximal_centers(
        self, slots: list[int], tickets: list[int], moving: torch.Tensor, fixed: torch.Tensor
    ) -> torch.Tensor:
        """What the pairs are pulled to, solved for where it is not known."""
        assert self.centers is not None and self.coarse_solution is not None
        centers = self.centers.get(slots, tickets, fixed)
        new = [i for i, visit in enumerate(zip(slots, tickets, strict=True)) if not self.centers.holds(*visit)]
        if new:
            centers[new] = self.coarse_solution(moving[new], fixed[new]).to(centers)
            self.centers.put([slots[i] for i in new], [tickets[i] for i in new], centers[new])
        return centers


class RegistrationEvaluator(SupervisedEvaluator):
    """
    :py:class:`monai.engines.SupervisedEvaluator` for pairs. The output of an iteration is one flat dictionary: the
    items of the batch (images, label maps, names) with what the inferer returned beside them, so that postprocessing
    transforms and metrics find ``ddf``, ``warped``, ``fixed_label``, ... by key.

    Of several processes one that has no pair takes part in what its handlers do before and after the pairs, such as
    putting scores together; MONAI's own leaves it out, and the others wait for it.
    """

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """
        Evaluate all pairs.

        Args:
            global_epoch: epoch of the training that the evaluation belongs to. Defaults to 1.
        """
        if self.state.epoch_length == 0 and process_count() > 1:
            self.state.max_epochs, self.state.epoch, self.state.iteration = max(global_epoch, 1), global_epoch, 0
            for event in (Events.STARTED, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED):
                self.fire_event(event)
        else:
            super().run(global_epoch)

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        if batchdata is None:
            raise ValueError("Must provide batch data for current iteration.")
        moving, _, args, kwargs = engine.prepare_batch(
            batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs
        )
        engine.state.output = dict(batchdata)
        with engine.mode(engine.network), torch.autocast(moving.device.type, enabled=engine.amp, **engine.amp_kwargs):
            engine.state.output.update(engine.inferer(moving, engine.network, *args, **kwargs))
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output
