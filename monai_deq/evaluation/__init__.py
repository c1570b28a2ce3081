# SPDX-License-Identifier: Apache-2.0
"""Comparison of registration methods: evaluations, costs, statistics, tables and figures."""

from __future__ import annotations

from .box_plots import box_plots
from .compare import METHODS, METRICS, compare
from .comparison_table import ComparisonTable
from .convergence import ITERATED_METHODS, converge
from .memory import TrainingMemory, live_tensors, saved_for_backward, training_memory
from .memory_benchmark import MEMORY_CASES, MemoryCase, MemoryRow, measure_memory, memory_table
from .memory_plot import memory_plot
from .method_costs import measure_costs
from .method_evaluation import BundleMethod, evaluate_method
from .method_results import METRIC_COLUMNS, MethodResult, MetricColumn, read_pair_results
from .scaling_benchmark import SCALING_CASES, ScalingRow, measure_scaling, scaling_table
from .speed_benchmark import SPEED_CASES, SpeedRow, measure_speed, speed_table
from .statistics import holm_correction, paired_wilcoxon
from .step_plots import step_plots
from .step_scores import StepScore, score_steps
from .step_table import StepCurve, step_curves, step_table
from .timing import Timing, time_side_by_side

__all__ = [
    "ITERATED_METHODS",
    "MEMORY_CASES",
    "METHODS",
    "METRICS",
    "METRIC_COLUMNS",
    "BundleMethod",
    "ComparisonTable",
    "MemoryCase",
    "MemoryRow",
    "MethodResult",
    "MetricColumn",
    "SCALING_CASES",
    "SPEED_CASES",
    "ScalingRow",
    "SpeedRow",
    "StepCurve",
    "StepScore",
    "Timing",
    "TrainingMemory",
    "box_plots",
    "compare",
    "converge",
    "evaluate_method",
    "holm_correction",
    "live_tensors",
    "measure_costs",
    "measure_memory",
    "memory_plot",
    "memory_table",
    "measure_scaling",
    "measure_speed",
    "paired_wilcoxon",
    "read_pair_results",
    "saved_for_backward",
    "scaling_table",
    "score_steps",
    "speed_table",
    "step_curves",
    "step_plots",
    "step_table",
    "time_side_by_side",
    "training_memory",
]
