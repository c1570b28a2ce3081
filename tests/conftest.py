# SPDX-License-Identifier: Apache-2.0
"""One thread a test process: the images are tiny, and several processes run beside each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
