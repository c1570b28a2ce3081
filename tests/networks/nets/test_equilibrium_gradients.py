# SPDX-License-Identifier: Apache-2.0
"""
Phantom and implicit gradients against closed forms (paper, Eq. 6-8), and what is evaluated again in the backward pass.

The update is affine, ``f(phi) = A phi + theta - phi`` over the flattened voxels, so that the equilibrium
``(I - A)^-1 theta`` and the exact gradient of a loss ``v = (I - A)^-T dL/dphi*`` (by theta) and ``v phi*^T`` (by A) are
known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import deq_net, pair, rest_settings, tiny_update

from monai_deq.losses import EquilibriumLoss, RegistrationLoss, StatesLoss
from monai_deq.networks.nets import DEQRegistrationNet

SIZES = [(3, 4), (2, 3, 2)]


class Affine(torch.nn.Module):
    def __init__(self, matrix: torch.Tensor, offset: torch.Tensor) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix)
        self.offset = torch.nn.Parameter(offset)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        return (ddf.flatten(1) @ self.matrix.T + self.offset).view_as(ddf) - ddf


def problem(size: tuple[int, ...], norm: float = 0.6) -> tuple[Affine, torch.Tensor, torch.Tensor]:
    """A full, non-symmetric contraction of the given spectral norm, and a pair of two items (one its target)."""
    generator = torch.Generator().manual_seed(7)
    n = len(size) * int(np.prod(size))
    matrix = torch.randn(n, n, dtype=torch.float64, generator=generator)
    matrix *= norm / torch.linalg.matrix_norm(matrix, 2)
    offset = torch.randn(n, dtype=torch.float64, generator=generator)
    images = torch.rand(2, 2, 1, *size, dtype=torch.float64, generator=generator)
    return Affine(matrix, offset), images[0], images[1]


def gradients(
    update: Affine, moving: torch.Tensor, fixed: torch.Tensor, **settings: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient of ``sum |phi - fixed|^2 / 2`` by the offset and the matrix."""
    arguments = {"max_steps": 120, "num_states": 0, "tolerance": 1e-14, **settings}
    net = deq_net(update, **arguments)
    update.zero_grad()
    _, ddf, _ = net.train()(moving, fixed)
    (0.5 * (ddf - fixed).square().sum()).backward()
    assert update.offset.grad is not None and update.matrix.grad is not None
    return update.offset.grad.numpy().copy(), update.matrix.grad.numpy().copy()


def closed_form(
    update: Affine, fixed: torch.Tensor, steps: int | None, damping: float
) -> tuple[np.ndarray, np.ndarray]:
    """Exact gradient (``steps=None``), or the sum of ``steps`` terms that Eq. 8 keeps of it."""
    a, theta = update.matrix.detach().numpy(), update.offset.detach().numpy()
    eye = np.eye(len(a))
    phi = np.linalg.solve(eye - a, theta)
    ndim = fixed.ndim - 2
    targets = np.repeat(fixed.numpy(), ndim, axis=1).reshape(2, -1)
    slopes = phi - targets  # dL/dphi of each item
    if steps is None:
        inverse = np.linalg.inv(eye - a)
    else:
        damped = damping * a + (1 - damping) * eye
        inverse = damping * np.sum([np.linalg.matrix_power(damped, k) for k in range(steps)], axis=0)
    v = (slopes @ inverse).sum(axis=0)
    return v, np.outer(v, phi)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_phantom_gradient(size: tuple[int, ...], damping: float) -> None:
    update, moving, fixed = problem(size)
    exact = closed_form(update, fixed, None, damping)
    errors = []
    for steps in (1, 2, 5, 20, 50):
        got = gradients(update, moving, fixed, phantom_steps=steps, phantom_damping=damping)
        for value, expected in zip(got, closed_form(update, fixed, steps, damping), strict=True):
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
        errors.append([np.linalg.norm(v - e) / np.linalg.norm(e) for v, e in zip(got, exact, strict=True)])
    # each step shrinks what is missing by |damping * A + (1 - damping) * I| <= 1 - 0.4 * damping
    assert np.all(np.diff(errors, axis=0) < 0)
    assert np.all(np.asarray(errors[0]) > 0.1)
    assert np.all(np.asarray(errors[-1]) < (1 - 0.4 * damping) ** 50)


@pytest.mark.parametrize(
    ("steps", "damping", "share"), [(1, 1.0, 0.40), (2, 1.0, 0.64), (2, 0.5, 0.36), (20, 0.5, 0.988)]
)
def test_share_of_the_gradient(steps: int, damping: float, share: float) -> None:
    # of a contraction by 0.6 in every direction, Eq. 8 keeps 1 - (0.6 damping + 1 - damping)^K
    update, moving, fixed = problem((3, 4))
    update.matrix.data = 0.6 * torch.eye(len(update.matrix), dtype=torch.float64)
    exact = closed_form(update, fixed, None, damping)
    for value, whole in zip(
        gradients(update, moving, fixed, phantom_steps=steps, phantom_damping=damping), exact, strict=True
    ):
        np.testing.assert_allclose(value, (1 - (0.6 * damping + 1 - damping) ** steps) * whole, rtol=1e-10)
        assert np.linalg.norm(value) / np.linalg.norm(whole) == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("solver", ["plain", "anderson"])
def test_implicit_gradient(size: tuple[int, ...], solver: str) -> None:
    update, moving, fixed = problem(size)
    got = gradients(
        update, moving, fixed, gradient="implicit", implicit_max_steps=200, implicit_tolerance=1e-12, solver=solver
    )
    for value, expected in zip(got, closed_form(update, fixed, None, 1.0), strict=True):
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_implicit_gradient_within_its_tolerance() -> None:
    update, moving, fixed = problem((3, 4))
    exact = closed_form(update, fixed, None, 1.0)[0]

    def error(**settings: Any) -> float:
        got = gradients(update, moving, fixed, gradient="implicit", **settings)[0]
        return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))

    assert error() < 1e-3  # the default, 1e-4 a step
    # ... relative to the gradient, however small the loss makes it
    _, ddf, _ = deq_net(update, max_steps=120, num_states=0, tolerance=1e-14, gradient="implicit")(moving, fixed)
    update.zero_grad()
    (1e-9 * 0.5 * (ddf - fixed).square().sum()).backward()
    assert update.offset.grad is not None
    np.testing.assert_allclose(
        1e9 * update.offset.grad.numpy(), exact, rtol=0, atol=1e-3 * float(np.linalg.norm(exact))
    )
    # two backward steps from zero are the two-term Neumann sum
    got = gradients(update, moving, fixed, gradient="implicit", implicit_max_steps=2)[0]
    np.testing.assert_allclose(got, closed_form(update, fixed, 2, 1.0)[0], rtol=1e-8)


def test_implicit_gradient_of_a_nonlinear_map() -> None:
    class Cosine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor([0.3, 0.7], dtype=torch.float64).view(1, 2, 1, 1))

        def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
            return self.rate * torch.cos(ddf + fixed) - moving * ddf

    torch.manual_seed(0)
    moving, fixed = torch.rand(2, 2, 1, 3, 4, dtype=torch.float64)
    update = Cosine()
    net = deq_net(
        update,
        num_states=0,
        max_steps=400,
        tolerance=1e-13,
        gradient="implicit",
        implicit_max_steps=400,
        implicit_tolerance=1e-12,
        solver="anderson",
    )
    moving = 0.5 + 0.3 * moving

    def loss() -> torch.Tensor:
        return net.train()(moving, fixed)[1].square().sum()

    loss().backward()
    assert update.rate.grad is not None
    for i, slope in enumerate(update.rate.grad.flatten().tolist()):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                update.rate[0, i] += step
                values.append(loss().item())
                update.rate[0, i] -= step
        assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


class AffineWithHidden(torch.nn.Module):
    """An affine map of displacement and hidden state together; the loss sees the displacement alone."""

    def __init__(self, matrix: torch.Tensor, offset: torch.Tensor, hidden_channels: int) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix)
        self.offset = torch.nn.Parameter(offset)
        self.hidden_channels = hidden_channels

    def forward(
        self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = torch.cat([ddf, hidden], dim=1)
        after = (state.flatten(1) @ self.matrix.T + self.offset).view_as(state)
        return after[:, : ddf.shape[1]] - ddf, after[:, ddf.shape[1] :]


@pytest.mark.parametrize("size", [(2, 3), (2, 1, 2)])
@pytest.mark.parametrize("gradient", ["phantom", "implicit"])
def test_gradient_with_hidden_state(size: tuple[int, ...], gradient: str) -> None:
    generator = torch.Generator().manual_seed(7)
    ndim, hidden = len(size), 2
    n, seen = (ndim + hidden) * int(np.prod(size)), ndim * int(np.prod(size))
    matrix = torch.randn(n, n, dtype=torch.float64, generator=generator)
    matrix *= 0.6 / torch.linalg.matrix_norm(matrix, 2)
    offset = torch.randn(n, dtype=torch.float64, generator=generator)
    moving, fixed = torch.rand(2, 2, 1, *size, dtype=torch.float64, generator=generator)

    # dL/dphi reaches the hidden rows of the map by (I - A)^-T only
    a = matrix.numpy()
    state = np.linalg.solve(np.eye(n) - a, offset.numpy())
    slopes = np.zeros((2, n))
    slopes[:, :seen] = state[:seen] - np.repeat(fixed.numpy(), ndim, axis=1).reshape(2, -1)
    exact = (slopes @ np.linalg.inv(np.eye(n) - a)).sum(axis=0)
    assert np.abs(exact[seen:]).max() > 0.1

    errors = []
    for steps in (1, 3, 10, 60) if gradient == "phantom" else (1,):
        update = AffineWithHidden(matrix.clone(), offset.clone(), hidden)
        net = deq_net(
            update,
            max_steps=150,
            num_states=0,
            tolerance=1e-14,
            phantom_steps=steps,
            gradient=gradient,
            implicit_max_steps=150,
            implicit_tolerance=1e-13,
        ).train()
        _, ddf, _ = net(moving, fixed)
        np.testing.assert_allclose(ddf.detach().flatten(1), np.stack([state[:seen]] * 2), rtol=0, atol=1e-11)
        (0.5 * (ddf - fixed).square().sum()).backward()
        assert update.offset.grad is not None and update.matrix.grad is not None
        if gradient == "phantom":  # Eq. 8: the first terms of the Neumann series
            kept = sum(np.linalg.matrix_power(a, k) for k in range(steps))
            v = (slopes @ kept).sum(axis=0)
            np.testing.assert_allclose(update.offset.grad, v, rtol=0, atol=1e-10)
            np.testing.assert_allclose(update.matrix.grad, np.outer(v, state), rtol=0, atol=1e-9)
        errors.append(np.linalg.norm(update.offset.grad.numpy() - exact) / np.linalg.norm(exact))
    assert np.all(np.diff(errors) < 0) and errors[-1] < 1e-9


@pytest.mark.parametrize("gradient", ["phantom", "implicit"])
def test_intermediate_states_have_phantom_gradients(gradient: str) -> None:
    # phi_t after T / 2 steps from zero; two steps further its gradient by theta is (I + A)
    update, moving, fixed = problem((3, 4))
    net = deq_net(update, max_steps=8, num_states=1, tolerance=0.0, phantom_steps=2, gradient=gradient).train()
    _, _, states = net(moving, fixed)
    weights = torch.randn(2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (states[0].flatten(1) * weights).sum().backward()
    a, theta = update.matrix.detach().numpy(), update.offset.detach().numpy()
    v = weights.sum(0).numpy()
    assert update.offset.grad is not None and update.matrix.grad is not None
    np.testing.assert_allclose(update.offset.grad, v @ (np.eye(24) + a), rtol=1e-10, atol=1e-12)
    phi = [np.zeros(24)]
    for _ in range(5):
        phi.append(a @ phi[-1] + theta)
    np.testing.assert_allclose(
        update.matrix.grad, np.outer(v @ a, phi[4]) + np.outer(v, phi[5]), rtol=1e-10, atol=1e-12
    )


# --- what is evaluated again ------------------------------------------------------------------------------------------


IMAGES = [(12, 9), (6, 4, 5)]


def network(ndim: int, checkpointed: bool, **settings: Any) -> DEQRegistrationNet:
    widths = {"encoder_channels": (4, 3, 5), "decoder_channels": (5, 3), "final_channels": (4,)}
    update = tiny_update(ndim, checkpoint_parts=3 if checkpointed else 0, **widths)
    settings = {"max_steps": 5, "num_states": 2, "tolerance": 0.0, "phantom_steps": 2, **settings}
    return deq_net(update, checkpointed=checkpointed, **settings)


def loss_and_gradients(
    size: tuple[int, ...], checkpointed: bool, contraction_weight: float = 0.0, bf16: bool = False, **settings: Any
) -> list[torch.Tensor]:
    dtype = torch.float32 if bf16 else torch.float64
    net = network(len(size), checkpointed, **settings).to(dtype).train()
    rest = rest_settings(contraction_weight=contraction_weight)
    loss = EquilibriumLoss(StatesLoss(RegistrationLoss(len(size)), checkpointed=checkpointed), net, rest)
    moving, fixed = pair(size, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        value = loss(net(moving, fixed), {"moving": moving, "fixed": fixed})
    value.backward()
    return [value.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize(
    "settings",
    [
        {"phantom_damping": 0.5},
        {"relaxation": 0.5, "proximal_weight": 0.1, "contraction_weight": 0.2},
        {"gradient": "implicit", "implicit_max_steps": 3},
    ],
)
def test_loss_and_gradients_stay(size: tuple[int, ...], settings: dict[str, Any]) -> None:
    plain = loss_and_gradients(size, False, **settings)
    again = loss_and_gradients(size, True, **settings)
    assert len(plain) == len(again) == 1 + len(list(network(len(size), False).parameters()))
    assert all(g.abs().max() > 0 for g in plain)
    for got, expected in zip(again, plain, strict=True):
        # the order of the sums alone
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


def test_gradients_under_autocast() -> None:
    plain, again = (loss_and_gradients((12, 9), use, bf16=True) for use in (False, True))
    exact = loss_and_gradients((12, 9), False)
    for got, expected, reference in zip(again, plain, exact, strict=True):
        # no further from each other than bfloat16 is from the exact gradient, on that scale
        rounding = (expected - reference).abs().max() + 0.01 * reference.abs().max()
        assert (got - expected).abs().max() <= 2 * rounding


def test_gradients_add_up_over_batches() -> None:
    moving, fixed = pair((12, 9), dtype=torch.float64)
    grads = []
    for checkpointed in (False, True):
        net = network(2, checkpointed).double().train()
        loss = StatesLoss(RegistrationLoss(2), checkpointed=checkpointed)
        for i in range(2):
            item = {"moving": moving[i : i + 1], "fixed": fixed[i : i + 1]}
            (loss(net(item["moving"], item["fixed"]), item) / 2).backward()
        grads.append([p.grad for p in net.parameters()])
    for got, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


def saved(size: tuple[int, ...], checkpointed: bool, max_steps: int, num_states: int, phantom_steps: int) -> float:
    """Peak of what autograd keeps, in images."""
    from monai_deq.evaluation import saved_for_backward

    net = network(len(size), checkpointed, max_steps=max_steps, num_states=num_states, phantom_steps=phantom_steps)
    loss = StatesLoss(RegistrationLoss(len(size)), checkpointed=checkpointed)
    moving, fixed = pair(size)
    with saved_for_backward([*net.parameters(), *net.buffers()]) as account:
        loss(net.train()(moving, fixed), {"moving": moving, "fixed": fixed}).backward()
    return account.peak_bytes / fixed.nbytes


@pytest.mark.parametrize("size", [(24, 32), (8, 12, 8)])
def test_memory_is_that_of_one_step_and_does_not_grow(size: tuple[int, ...]) -> None:
    one, plain, again = saved(size, False, 1, 0, 1), saved(size, False, 8, 3, 2), saved(size, True, 8, 3, 2)
    assert plain > 4 * one
    # beyond the largest of a step and a loss there are the states themselves: four, and two of each chain
    assert again < one + len(size) * 4 * 2
    assert saved(size, True, 16, 3, 2) == again


def test_nothing_is_evaluated_twice_without_gradients() -> None:
    moving, fixed = pair((12, 9), dtype=torch.float64)
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
        moving, fixed = pair((12, 9), dtype=torch.float64)
        grads = []
        for checkpointed in (False, True):
            net = network(2, checkpointed).double().train()
            loss = StatesLoss(RegistrationLoss(2), checkpointed=checkpointed)
            parallel = torch.nn.parallel.DistributedDataParallel(net)
            loss(parallel(moving, fixed), {"moving": moving, "fixed": fixed}).backward()
            grads.append([p.grad for p in net.parameters()])
            del parallel  # the last to hold the group would wait for Gloo's threads, which may wait for it
    finally:
        torch.distributed.destroy_process_group()
    alone = loss_and_gradients((12, 9), False)[1:]
    for got, plain, expected in zip(grads[1], grads[0], alone, strict=True):
        torch.testing.assert_close(got, plain, rtol=0, atol=1e-11 * float(plain.abs().max()))
        torch.testing.assert_close(plain, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))
