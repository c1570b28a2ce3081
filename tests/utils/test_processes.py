# SPDX-License-Identifier: Apache-2.0
"""What several processes share, in one process; for two of them see tests/bundles/test_multi_process.py."""

from __future__ import annotations

import pytest
import torch

from monai_deq.utils import (
    check_device,
    end_processes,
    gather_items,
    gather_to_first,
    init_processes,
    local_device,
    mean_over_processes,
    process_count,
    process_rank,
    wait_for_all,
)


def test_one_process_has_all() -> None:
    assert (process_rank(), process_count()) == (0, 1)
    assert gather_items((3, "a")) == [3, "a"] and gather_to_first([3]) == [[3]]
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    assert torch.equal(mean_over_processes(value), value) and not mean_over_processes(value).requires_grad
    wait_for_all()
    end_processes()


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="started by torchrun"):
        init_processes("cpu")


def test_each_process_of_a_node_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device() == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this node has no GPU, there are 2"):
        local_device()


@pytest.mark.parametrize("name", ["", "banana", "cuda:99", "-1"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match=f"device: expected cpu or a GPU that is there, got '{name}'"):
        check_device(name)
    assert check_device("cpu") == torch.device("cpu")
