# SPDX-License-Identifier: Apache-2.0
"""Comparison of registration methods: evaluations, costs, statistics, tables and figures."""

from __future__ import annotations

from .box_plots import box_plots
from .compare import METHODS, METRICS, compare
from .comparison_table import ComparisonTable
from .memory import TrainingMemory, live_tensors, saved_for_backward, training_memory
from .method_costs import measure_costs
from .method_evaluation import BundleMethod, evaluate_method
from .method_results import METRIC_COLUMNS, MethodResult, MetricColumn, read_pair_results
from .statistics import holm_correction, mean_std, paired_wilcoxon
from .timing import Timing, time_side_by_side

__all__ = [
    "METHODS",
    "METRICS",
    "METRIC_COLUMNS",
    "BundleMethod",
    "ComparisonTable",
    "MethodResult",
    "MetricColumn",
    "Timing",
    "TrainingMemory",
    "box_plots",
    "compare",
    "evaluate_method",
    "holm_correction",
    "live_tensors",
    "mean_std",
    "measure_costs",
    "paired_wilcoxon",
    "read_pair_results",
    "saved_for_backward",
    "time_side_by_side",
    "training_memory",
]
