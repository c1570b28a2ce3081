# SPDX-License-Identifier: Apache-2.0
"""``python -m monai_deq.evaluation compare --bundle_dir bundles/oasis --results_dir results ...``"""

from __future__ import annotations

import logging

from monai_deq.evaluation.compare import compare
from monai_deq.evaluation.convergence import converge
from monai_deq.evaluation.memory_benchmark import measure_memory
from monai_deq.evaluation.scaling_benchmark import measure_scaling
from monai_deq.evaluation.speed_benchmark import measure_speed

if __name__ == "__main__":
    import fire

    logging.basicConfig(level=logging.INFO, format="%(asctime)s - %(levelname)s - %(message)s")
    # the table is printed by compare itself
    commands = {
        "compare": compare,
        "converge": converge,
        "memory": measure_memory,
        "scaling": measure_scaling,
        "speed": measure_speed,
    }
    fire.Fire(commands, serialize=lambda _: None)
