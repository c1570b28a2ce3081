# SPDX-License-Identifier: Apache-2.0
"""How many cases hypothesis draws: the same few each time, or with ``--hypothesis-profile search`` many others."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

_COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("repeat", derandomize=True, max_examples=25, database=None, **_COMMON)
settings.register_profile("search", derandomize=False, max_examples=500, print_blob=True, **_COMMON)
settings.load_profile("repeat")  # what is asked for on the command line is loaded behind this
