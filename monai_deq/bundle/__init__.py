# SPDX-License-Identifier: Apache-2.0
"""What is done with a bundle as a whole."""

from __future__ import annotations

from .zoo import write_zoo_package

__all__ = ["write_zoo_package"]
