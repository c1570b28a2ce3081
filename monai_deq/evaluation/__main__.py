# SPDX-License-Identifier: Apache-2.0
"""``python -m monai_deq.evaluation compare --bundle_dir bundles/oasis --results_dir results ...``"""

from __future__ import annotations

import logging
from typing import Any

from monai_deq.evaluation.compare import compare


def _compare(*args: Any, **kwargs: Any) -> None:
    compare(*args, **kwargs)


if __name__ == "__main__":
    import fire

    logging.basicConfig(level=logging.INFO, format="%(asctime)s - %(levelname)s - %(message)s")
    _compare.__doc__ = compare.__doc__
    fire.Fire({"compare": _compare})
