# SPDX-License-Identifier: Apache-2.0
"""What is evaluated again in the backward pass changes neither the loss nor a gradient, and is not kept before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from monai_deq.evaluation import saved_for_backward
from monai_deq.losses import EquilibriumLoss, RegistrationLoss, StatesLoss
from monai_deq.networks.blocks import RegistrationUNet, UNetUpdate
from monai_deq.networks.nets import DEQRegistrationNet

SIZES = [(18, 21), (10, 8, 13)]
PENALTIES = {"residual_weight": 0.5, "jacobian_weight": 0.1, "contraction_weight": 0.2}


def network(ndim: int, use_checkpoint: bool, **settings: Any) -> DEQRegistrationNet:
    torch.manual_seed(0)
    backbone = RegistrationUNet(
        ndim,
        2 + ndim,
        encoder_channels=(4, 3, 5),
        decoder_channels=(5, 3),
        final_channels=(4,),
        flow_std=0.05,
        use_checkpoint=use_checkpoint,
        checkpoint_parts=3,
    )
    settings = {"max_steps": 5, "num_states": 2, "tolerance": 0.0, "phantom_steps": 2, **settings}
    return DEQRegistrationNet(UNetUpdate(ndim, backbone), use_checkpoint=use_checkpoint, **settings)


def pair(size: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    moving, fixed = torch.rand(2, 2, 1, *size, generator=generator, dtype=dtype)
    return moving, fixed


def loss_and_gradients(
    size: tuple[int, ...], use_checkpoint: bool, penalties: dict[str, float], bf16: bool = False, **settings: Any
) -> list[torch.Tensor]:
    dtype = torch.float32 if bf16 else torch.float64
    net = network(len(size), use_checkpoint, **settings).to(dtype).train()
    loss = EquilibriumLoss(
        StatesLoss(RegistrationLoss(len(size)), use_checkpoint=use_checkpoint),
        net,
        **penalties,  # type: ignore[arg-type]
    )
    moving, fixed = pair(size, dtype)
    torch.manual_seed(2)  # Hutchinson's noise
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        value = loss(net(moving, fixed), {"moving": moving, "fixed": fixed})
    value.backward()
    return [value.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("settings", "penalties"),
    [
        ({"phantom_damping": 0.5}, {}),
        ({"relaxation": 0.5}, PENALTIES),
        ({"gradient": "implicit", "implicit_max_steps": 3}, {}),
    ],
)
def test_loss_and_gradients_stay(size: tuple[int, ...], settings: dict[str, Any], penalties: dict[str, float]) -> None:
    plain = loss_and_gradients(size, False, penalties, **settings)
    again = loss_and_gradients(size, True, penalties, **settings)
    assert len(plain) == len(again) == 1 + len(list(network(len(size), False).parameters()))
    assert all(g.abs().max() > 0 for g in plain)
    for got, expected in zip(again, plain, strict=True):
        # the order of the sums alone
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


def test_gradients_under_autocast() -> None:
    plain, again = (loss_and_gradients((18, 21), use, {}, bf16=True) for use in (False, True))
    exact = loss_and_gradients((18, 21), False, {})
    for got, expected, reference in zip(again, plain, exact, strict=True):
        # no further from each other than bfloat16 is from the exact gradient, on that scale
        rounding = (expected - reference).abs().max() + 0.01 * reference.abs().max()
        assert (got - expected).abs().max() <= 2 * rounding


def test_gradients_add_up_over_batches() -> None:
    moving, fixed = pair((18, 21))
    grads = []
    for use_checkpoint in (False, True):
        net = network(2, use_checkpoint).double().train()
        loss = StatesLoss(RegistrationLoss(2), use_checkpoint=use_checkpoint)
        for i in range(2):
            item = {"moving": moving[i : i + 1], "fixed": fixed[i : i + 1]}
            (loss(net(item["moving"], item["fixed"]), item) / 2).backward()
        grads.append([p.grad for p in net.parameters()])
    for got, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


def saved(size: tuple[int, ...], use_checkpoint: bool, max_steps: int, num_states: int, phantom_steps: int) -> float:
    """Peak of what autograd keeps, in images."""
    net = network(len(size), use_checkpoint, max_steps=max_steps, num_states=num_states, phantom_steps=phantom_steps)
    loss = StatesLoss(RegistrationLoss(len(size)), use_checkpoint=use_checkpoint)
    moving, fixed = pair(size, torch.float32)
    with saved_for_backward([*net.parameters(), *net.buffers()]) as account:
        loss(net.train()(moving, fixed), {"moving": moving, "fixed": fixed}).backward()
    return account.peak_bytes / fixed.nbytes


@pytest.mark.parametrize("size", [(48, 64), (16, 16, 24)])
def test_memory_is_that_of_one_step_and_does_not_grow(size: tuple[int, ...]) -> None:
    one, plain = saved(size, False, 1, 0, 1), saved(size, False, 8, 3, 2)
    assert plain > 4 * one
    # beyond the largest of a step and a loss there are the states themselves: four, and two of each chain
    states = len(size) * 4 * 2
    assert saved(size, True, 8, 3, 2) < one + states
    assert saved(size, True, 32, 3, 2) == saved(size, True, 8, 3, 2)


def test_nothing_is_evaluated_twice_without_gradients() -> None:
    moving, fixed = pair((18, 21))
    net = network(2, True).double().eval()
    calls = []
    net.update.register_forward_hook(lambda *_: calls.append(1))
    net(moving, fixed)
    plain = network(2, False).double().eval()(moving, fixed)
    assert len(calls) == 5
    torch.testing.assert_close(net(moving, fixed), plain, rtol=0, atol=0)


def test_gradients_under_distributed_data_parallel(tmp_path: Path) -> None:
    # a group of one process: its hooks see every use of a parameter in the backward pass
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        moving, fixed = pair((18, 21))
        grads = []
        for use_checkpoint in (False, True):
            net = network(2, use_checkpoint).double().train()
            loss = StatesLoss(RegistrationLoss(2), use_checkpoint=use_checkpoint)
            parallel = torch.nn.parallel.DistributedDataParallel(net)
            loss(parallel(moving, fixed), {"moving": moving, "fixed": fixed}).backward()
            grads.append([p.grad for p in net.parameters()])
    finally:
        torch.distributed.destroy_process_group()
    alone = loss_and_gradients((18, 21), False, {})[1:]
    for got, plain, expected in zip(grads[1], grads[0], alone, strict=True):
        torch.testing.assert_close(got, plain, rtol=0, atol=1e-11 * float(plain.abs().max()))
        torch.testing.assert_close(plain, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))
