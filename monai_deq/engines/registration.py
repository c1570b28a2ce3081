# SPDX-License-Identifier: Apache-2.0
"""What MONAI's engines need to know about pairs of images."""

from __future__ import annotations

from typing import Any

import torch
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents, PrepareBatch

from monai_deq.data import StatePool

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
    """

    def __init__(
        self, moving_key: str = "moving", fixed_key: str = "fixed", initial_ddf_key: str = "initial_ddf"
    ) -> None:
        self.moving_key = moving_key
        self.fixed_key = fixed_key
        self.initial_ddf_key = initial_ddf_key

    def __call__(
        self,
        batchdata: dict[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple[torch.Tensor, ...], dict[str, Any]]:
        """Return ``(moving, target, (fixed,), {})`` or ``(moving, target, (fixed, initial_ddf), {})``."""

        def plain(key: str) -> torch.Tensor:
            image = batchdata[key]
            image = image.as_tensor() if hasattr(image, "as_tensor") else image
            return image.to(device=device, non_blocking=non_blocking, **kwargs)

        moving, fixed = plain(self.moving_key), plain(self.fixed_key)
        start = (plain(self.initial_ddf_key),) if self.initial_ddf_key in batchdata else ()
        return moving, {"moving": moving, "fixed": fixed}, (fixed, *start), {}


class PreparePooledPairBatch(PreparePairBatch):
    """
    :py:class:`PreparePairBatch` for pairs that go on from where they stand: the network is called as
    ``network(moving, fixed, initial_ddf)``, for a training of :py:class:`monai_deq.networks.nets.DEQRegistrationNet`.

    Args:
        pool: where the displacements are kept; :py:class:`monai_deq.handlers.StatePoolUpdater` writes them back.
        moving_key: key of the moving images. Defaults to ``"moving"``.
        fixed_key: key of the fixed images. Defaults to ``"fixed"``.
    """

    def __init__(self, pool: StatePool, moving_key: str = "moving", fixed_key: str = "fixed") -> None:
        super().__init__(moving_key, fixed_key)
        self.pool = pool

    def __call__(  # type: ignore[override]
        self,
        batchdata: dict[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple[torch.Tensor, ...], dict[str, Any]]:
        """Return ``(moving, target, (fixed, initial_ddf), {})``."""
        moving, target, (fixed, *_), settings = super().__call__(batchdata, device, non_blocking, **kwargs)
        absent = [key for key in ("slot", "ticket") if key not in batchdata]
        if absent:
            raise KeyError(f"a pooled batch needs {absent}: use PooledPairDataset with a PooledPairSampler.")
        ddf = self.pool.get(batchdata["slot"].tolist(), batchdata["ticket"].tolist(), fixed)
        return moving, target, (fixed, ddf), settings


class RegistrationEvaluator(SupervisedEvaluator):
    """
    :py:class:`monai.engines.SupervisedEvaluator` for pairs. The output of an iteration is one flat dictionary: the
    items of the batch (images, label maps, names) with what the inferer returned beside them, so that postprocessing
    transforms and metrics find ``ddf``, ``warped``, ``fixed_label``, ... by key.
    """

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
