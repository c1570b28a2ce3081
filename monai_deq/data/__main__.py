# SPDX-License-Identifier: Apache-2.0
"""``python -m monai_deq.data download --name neurite-oasis --output_dir data --accept_terms true``"""

from __future__ import annotations

import logging

from monai_deq.data.public_datasets import download_dataset

if __name__ == "__main__":
    import fire

    logging.basicConfig(level=logging.INFO, format="%(asctime)s - %(levelname)s - %(message)s")
    try:
        fire.Fire({"download": download_dataset}, serialize=lambda _: None)
    except (OSError, RuntimeError, ValueError) as e:
        # these say what to do; where they come from is of no use to the reader
        raise SystemExit(f"{type(e).__name__}: {e}") from e
