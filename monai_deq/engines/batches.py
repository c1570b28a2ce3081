# SPDX-License-Identifier: Apache-2.0
"""What an engine makes of a batch of pairs: arguments of the network, and what the loss compares with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from monai.engines.utils import PrepareBatch

from monai_deq.data import StatePool
from monai_deq.networks.nets import IteratedNet, RestSettings
from monai_deq.solvers import random_smooth_ddf

__all__ = ["PreparePairBatch", "PreparePooledPairBatch"]

#: smoothness of random starts in voxels
_SMOOTHNESS = 8.0


class PreparePairBatch(PrepareBatch):
    """Split a batch of pairs into what a registration network takes, ``(moving, fixed)`` or ``(moving, fixed,
    initial_ddf)`` where the batch has displacements to start from, and what the loss compares with, ``{"moving": ...,
    "fixed": ...}``, all plain tensors.

    Args:
        moving_key: key of the moving images. Defaults to ``"moving"``.
        fixed_key: key of the fixed images. Defaults to ``"fixed"``.
        initial_ddf_key: key of the displacements to start from. Defaults to ``"initial_ddf"``.
        target_keys: what else the loss compares with, under the same names: tensors or lists of tensors, e.g. masks and
            keypoints. Defaults to none.
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
    """:py:class:`PreparePairBatch` for pairs that go on from where they stand, ``(moving, fixed, initial_ddf)``. Where
    all pairs of a batch are new and start from zero the network is called without, so that one with coarser levels
    begins at these; in a batch with others, new ones start from the network's ``coarse_start``. With a proximal term
    the coarser solutions are kept as the displacements are, and given to network and loss as ``proximal_center``.

    Args:
        pool: where the displacements are kept; :py:class:`monai_deq.handlers.StatePoolUpdater` writes them back.
        network: the network that is trained, without ``DistributedDataParallel`` around it. Defaults to ``None``: new
            pairs start from zero.
        rest: ``random_start_share`` and ``random_start_rms``, up to which a start's length is drawn uniformly. Defaults
            to ``None``: no random starts.
        seed: of the random starts. Defaults to 0.
        target_keys: see :py:class:`PreparePairBatch`. Defaults to none.
    """

    def __init__(
        self,
        pool: StatePool,
        network: nn.Module | None = None,
        rest: RestSettings | None = None,
        seed: int = 0,
        target_keys: Sequence[str] = (),
    ) -> None:
        super().__init__(target_keys=target_keys)
        self.pool = pool
        self.rest = rest or RestSettings(enabled=False)
        self.seed = int(seed)
        self.network = network if isinstance(network, IteratedNet) and network.coarse is not None else None
        # solved for again, not read from a checkpoint, after a training was resumed
        pulled = self.network is not None and bool(self.network.proximal_weight)
        self.centers = StatePool(pool.slots, pool.folder) if pulled else None

    def __call__(  # type: ignore[override]
        self,
        batchdata: dict[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any], tuple[torch.Tensor, ...], dict[str, Any]]:
        """Return ``(moving, target, (fixed[, initial_ddf]), settings)``, the settings those of the network's
        ``forward``.
        """
        moving, target, (fixed, *_), settings = super().__call__(batchdata, device, non_blocking, **kwargs)
        absent = [key for key in ("slot", "ticket") if key not in batchdata]
        if absent:
            raise KeyError(f"a pooled batch needs {absent}: use PooledDataset with a PooledSampler.")
        slots, tickets = batchdata["slot"].tolist(), batchdata["ticket"].tolist()
        met = [self.pool.holds(*visit) for visit in zip(slots, tickets, strict=True)]
        ddf = self.pool.get(slots, tickets, fixed)
        centers = None if self.centers is None else self._proximal_centers(slots, tickets, moving, fixed)
        for i, (ticket, known) in enumerate(zip(tickets, met, strict=True)):
            # the draws depend on seed and ticket alone, so that a resumed training makes the same; seeds lie far apart
            # in the 32 bits that PyTorch's generator looks at
            key = (self.seed * 0x9E3779B1 + ticket) % 2**32
            chance, length = torch.rand(2, generator=torch.Generator().manual_seed(key)).tolist()
            if not known and chance < self.rest.random_start_share:
                rms = self.rest.random_start_rms * length
                ddf[i : i + 1] = random_smooth_ddf((1, *ddf.shape[1:]), rms, _SMOOTHNESS, key, ddf.device)
                met[i] = True
        new = [i for i, known in enumerate(met) if not known]
        if centers is not None:
            ddf[new] = centers[new]
            target, settings = {**target, "proximal_center": centers}, {**settings, "proximal_center": centers}
            met = [True] * len(met)
        elif new and len(new) < len(met) and self.network is not None:
            ddf[new] = self._coarse_solution(moving[new], fixed[new]).to(ddf)
        return moving, target, (fixed, ddf) if any(met) else (fixed,), settings

    def _coarse_solution(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        assert self.network is not None
        solution, _ = self.network.coarse_start(moving, fixed)
        assert solution is not None
        return solution

    def _proximal_centers(
        self, slots: list[int], tickets: list[int], moving: torch.Tensor, fixed: torch.Tensor
    ) -> torch.Tensor:
        """What the pairs are pulled to, solved for where it is not known."""
        assert self.centers is not None
        centers = self.centers.get(slots, tickets, fixed)
        new = [i for i, visit in enumerate(zip(slots, tickets, strict=True)) if not self.centers.holds(*visit)]
        if new:
            centers[new] = self._coarse_solution(moving[new], fixed[new]).to(centers)
            self.centers.put([slots[i] for i in new], [tickets[i] for i in new], centers[new])
        return centers
