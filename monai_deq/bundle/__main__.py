# SPDX-License-Identifier: Apache-2.0
"""``python -m monai_deq.bundle zoo --bundle_dir bundles/oasis --weights run/models/model.pt --output_dir zoo``"""

from __future__ import annotations

import logging

from monai_deq.bundle.zoo_package import write_zoo_package

if __name__ == "__main__":
    import fire

    logging.basicConfig(level=logging.INFO, format="%(asctime)s - %(levelname)s - %(message)s")
    try:
        fire.Fire({"zoo": write_zoo_package}, serialize=lambda _: None)
    except (OSError, ValueError) as e:
        # these say what to do; where they come from is of no use to the reader
        raise SystemExit(f"{type(e).__name__}: {e}") from e
