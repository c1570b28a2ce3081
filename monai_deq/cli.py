# SPDX-License-Identifier: Apache-2.0
"""The command ``monai-deq``."""

from __future__ import annotations

import ast
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    help="Compare, iterate and measure registration methods of a bundle; fetch data; pack a bundle for the Model Zoo.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _value(text: str) -> Any:
    """What a setting says, as JSON or as Python writes it, and else the text itself."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _settings(given: list[str]) -> dict[str, Any]:
    if wrong := [entry for entry in given if entry.find("=") < 1]:
        raise ValueError(f"--set: expected name=value, got {wrong[0]!r}.")
    return {name: _value(text) for name, text in (entry.split("=", 1) for entry in given)}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in _names(text)]
    except ValueError:
        raise ValueError(f"expected whole numbers with commas between them, got {text!r}.") from None


def _cases(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    cases = _value(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    if not isinstance(cases, dict):
        raise ValueError(f"--cases: expected a dictionary of cases, or a JSON file of one, got {text!r}.")
    return cases


BundleDir = Annotated[Path, typer.Option(help="Folder of the bundle.")]
ResultsDir = Annotated[Path, typer.Option(help="Folder of the methods' folders, trained with --bundle_root.")]
OutputDir = Annotated[Path, typer.Option(help="Folder of what is written.")]
TableDir = Annotated[Path | None, typer.Option(help="Folder of table and figure. [default: --results-dir]")]
Overlays = Annotated[str, typer.Option(help="Configuration files of the data set, e.g. slices.json, with commas.")]
Set = Annotated[list[str], typer.Option("--set", help="Setting of the bundle, name=value. May be repeated.")]
Cases = Annotated[str | None, typer.Option(help="What is measured: JSON, or a file of it. [default: the paper's]")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]


@app.command("compare")
def compare_methods(
    bundle_dir: BundleDir,
    results_dir: ResultsDir,
    methods: Annotated[str, typer.Option(help="Names of the methods. [default: all of the paper]")] = "",
    overlays: Overlays = "",
    settings: Set = [],  # noqa: B006
    reference: Annotated[str, typer.Option(help="Method that the others are tested against.")] = "deqreg",
    metrics: Annotated[str, typer.Option(help="Metrics of the table. [default: all of the OASIS bundle]")] = "",
    cost_rounds: Annotated[int, typer.Option(help="How often times are taken; 0: no costs.")] = 5,
    output_dir: TableDir = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare methods on one data set: scores, paired tests, costs; a table and box plots.

    Example: monai-deq compare --bundle-dir bundles/oasis --results-dir results --overlays slices.json
    --methods affine,riir,deqreg --set dataset_dir=DATA
    """
    from monai_deq.evaluation import METHODS, METRICS, compare

    names, columns = _names(methods) or METHODS, _names(metrics) or METRICS
    files, given = _names(overlays), _settings(settings)
    compare(bundle_dir, results_dir, names, files, given, reference, columns, cost_rounds, output_dir, overwrite)


@app.command("converge")
def iterate_methods(
    bundle_dir: BundleDir,
    results_dir: ResultsDir,
    methods: Annotated[str, typer.Option(help="Names of the methods. [default: all that are iterated]")] = "",
    overlays: Overlays = "",
    settings: Set = [],  # noqa: B006
    max_steps: Annotated[int, typer.Option(help="Number of steps.")] = 96,
    random_start_rms: Annotated[float, typer.Option(help="Length in voxels of a random start; 0: none.")] = 3.0,
    table_steps: Annotated[str, typer.Option(help="Further steps in the table, e.g. 24,48.")] = "",
    output_dir: TableDir = None,
    overwrite: Overwrite = False,
) -> None:
    """Iterate trained methods far beyond their training: a table of trained, best and last steps, and curves. The pairs
    are those of the validation, unless --set split=test says otherwise.

    Example: monai-deq converge --bundle-dir bundles/oasis --results-dir results --methods riir,deqreg_pool
    --max-steps 200 --table-steps 24,48,96 --set dataset_dir=DATA
    """
    from monai_deq.evaluation import ITERATED_METHODS, converge

    names, files, given = _names(methods) or ITERATED_METHODS, _names(overlays), _settings(settings)
    steps = (max_steps, random_start_rms, _numbers(table_steps))
    converge(bundle_dir, results_dir, names, files, given, *steps, output_dir, overwrite)


@app.command("memory")
def memory_of_training(
    bundle_dir: BundleDir,
    output_dir: OutputDir,
    spatial_size: Annotated[str, typer.Option(help="Size of the images.")] = "64,64,64",
    steps: Annotated[str, typer.Option(help="Steps of equilibrium systems.")] = "6,12,24,48,96",
    unrolled_steps: Annotated[str, typer.Option(help="Steps of unrolled systems.")] = "1,3,6,12",
    cases: Cases = None,
    rounds: Annotated[int, typer.Option(help="How often times are taken; 0: not.")] = 0,
    settings: Set = [],  # noqa: B006
    overwrite: Overwrite = False,
) -> None:
    """Measure the training memory of a bundle's systems against their number of steps.

    Example: monai-deq memory --bundle-dir bundles/oasis --spatial-size 96,96,96 --steps 6,48 --output-dir memory
    --set autocast_dtype=bfloat16
    """
    from monai_deq.evaluation import measure_memory

    numbers = (_numbers(spatial_size), _numbers(steps), _numbers(unrolled_steps))
    measure_memory(bundle_dir, output_dir, *numbers, _cases(cases), rounds, _settings(settings), overwrite)


@app.command("scaling")
def scaling_with_size(
    bundle_dir: BundleDir,
    output_dir: OutputDir,
    sizes: Annotated[str, typer.Option(help="Sizes, e.g. 64x64x64,96x96x96. [default: 32x32x32 to 160x192x224]")] = "",
    cases: Cases = None,
    rounds: Annotated[int, typer.Option(help="How often times are taken.")] = 3,
    settings: Set = [],  # noqa: B006
    overwrite: Overwrite = False,
) -> None:
    """Measure time and memory of a registration against the size of the images, with untrained networks.

    Example: monai-deq scaling --bundle-dir bundles/oasis --sizes 64x64x64,160x192x224 --output-dir scaling
    """
    from monai_deq.evaluation import measure_scaling
    from monai_deq.evaluation.benchmarks import SIZES

    shapes = [_numbers(size.replace("x", ",")) for size in _names(sizes)] or SIZES
    measure_scaling(bundle_dir, output_dir, shapes, _cases(cases), rounds, _settings(settings), overwrite)


@app.command("speed")
def speed_of_solvers(
    bundle_dir: BundleDir,
    results_dir: ResultsDir,
    output_dir: OutputDir,
    cases: Cases = None,
    overlays: Overlays = "",
    rounds: Annotated[int, typer.Option(help="How often times are taken.")] = 5,
    settings: Set = [],  # noqa: B006
    overwrite: Overwrite = False,
) -> None:
    """Compare accuracy and time of trained methods with several solvers and tolerances.

    Example: monai-deq speed --bundle-dir bundles/oasis --results-dir results --output-dir speed --overlays slices.json
    --set dataset_dir=DATA
    """
    from monai_deq.evaluation import measure_speed

    files, given = _names(overlays), _settings(settings)
    measure_speed(bundle_dir, results_dir, output_dir, _cases(cases), files, rounds, given, overwrite)


@app.command("download")
def download_data(
    name: Annotated[str, typer.Option(help="neurite-oasis, neurite-oasis-2d, learn2reg-nlst or learn2reg-oasis.")],
    output_dir: OutputDir,
    accept_terms: Annotated[bool, typer.Option("--accept-terms", help="Accept the terms, which are printed.")] = False,
    url: Annotated[str | None, typer.Option(help="Another address of the archive.")] = None,
    checksum: Annotated[str | None, typer.Option(help="Of the archive, <kind>:<digits>, or skip.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Download a public data set and unpack it.

    Example: monai-deq download --name neurite-oasis --output-dir data --accept-terms
    """
    from monai_deq.data import download_dataset

    download_dataset(name, output_dir, accept_terms, url=url, checksum=checksum, overwrite=overwrite)


@app.command("zoo")
def pack_for_zoo(
    bundle_dir: BundleDir,
    weights: Annotated[Path, typer.Option(help="The trained weights, with their record beside them.")],
    output_dir: OutputDir,
    name: Annotated[str | None, typer.Option(help="Name of the package. [default: <bundle>_deq_registration]")] = None,
    overlays: Overlays = "",
    weights_url: Annotated[str | None, typer.Option(help="Where weights of more than 25 MiB are.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a trained bundle in the layout of MONAI's Model Zoo.

    Example: monai-deq zoo --bundle-dir bundles/oasis --weights run/models/model.pt --output-dir zoo
    """
    from monai_deq.bundle import write_zoo_package

    write_zoo_package(bundle_dir, weights, output_dir, name, _names(overlays), weights_url, overwrite)


def main() -> None:
    """Run the command: errors that say what to do are one line on stderr, with exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s - %(levelname)s - %(message)s")
    try:
        app()
    except (OSError, RuntimeError, ValueError) as e:
        print(f"{type(e).__name__}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
