# SPDX-License-Identifier: Apache-2.0
"""Features between 0 and 1, of odd sizes too, that do not depend on brightness and contrast."""

from __future__ import annotations

import pytest
import torch

from monai_deq.networks.nets import FeatureUNet


@pytest.mark.parametrize("size", [(33, 21), (17, 20, 19)])
def test_shares_of_channels(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = FeatureUNet(len(size), 5, (4, 4, 4, 8, 8, 4)).eval()
    image = torch.rand(2, 1, *size)
    features = net(image)
    assert features.shape == (2, 5, *size) and features.min() >= 0
    assert torch.allclose(features.sum(dim=1), torch.ones(2, *size), atol=1e-6)
    assert torch.allclose(net(0.3 * image + 0.2), features, atol=1e-4)
    assert torch.isfinite(net(torch.zeros_like(image))).all()
    other = torch.rand(2, 1, *size)
    for both, alone in zip(net(image, other), (features, net(other)), strict=True):
        torch.testing.assert_close(both, alone)


def test_small_images() -> None:
    net = FeatureUNet(2, 3, (4, 4, 4, 8, 8, 4))
    assert net(torch.rand(1, 1, 16, 17)).shape == (1, 3, 16, 17)
    with pytest.raises(ValueError, match=r"features need 16 voxels along each axis, got shape \(1, 1, 40, 15\)"):
        net(torch.rand(1, 1, 40, 15))
