# SPDX-License-Identifier: Apache-2.0
"""Comparison of registration methods: evaluations, costs, statistics, tables and figures."""

from __future__ import annotations

from .benchmarks import MEMORY_CASES, SCALING_CASES, SPEED_CASES, measure_memory, measure_scaling, measure_speed
from .comparison import METHODS, METRICS, compare
from .convergence import ITERATED_METHODS, converge, score_steps, step_curves, step_table
from .costs import measure_costs
from .figures import plot_boxes, plot_lines, plot_steps
from .measurements import Timing, TrainingMemory, live_tensors, saved_for_backward, time_side_by_side, training_memory
from .methods import BundleMethod, evaluate_method
from .reports import write_evaluation_report
from .scores import (
    METRIC_COLUMNS,
    MethodResult,
    MetricColumn,
    PairedTest,
    holm_correction,
    paired_wilcoxon,
    read_pair_results,
)
from .tables import ComparisonTable

__all__ = [
    "ITERATED_METHODS",
    "MEMORY_CASES",
    "METHODS",
    "METRICS",
    "METRIC_COLUMNS",
    "SCALING_CASES",
    "SPEED_CASES",
    "BundleMethod",
    "ComparisonTable",
    "MethodResult",
    "MetricColumn",
    "PairedTest",
    "Timing",
    "TrainingMemory",
    "compare",
    "converge",
    "evaluate_method",
    "holm_correction",
    "live_tensors",
    "measure_costs",
    "measure_memory",
    "measure_scaling",
    "measure_speed",
    "paired_wilcoxon",
    "plot_boxes",
    "plot_lines",
    "plot_steps",
    "read_pair_results",
    "saved_for_backward",
    "score_steps",
    "step_curves",
    "step_table",
    "time_side_by_side",
    "training_memory",
    "write_evaluation_report",
]
