# SPDX-License-Identifier: Apache-2.0
"""The command ``monai-deq``."""

from __future__ import annotations

import ast
import json
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    help="Check files; register scans, apply and invert transforms; compare, iterate and measure the methods of a "
    "bundle; report an evaluation; fetch data; pack a bundle for the Model Zoo. With --debug an error shows its trace.",
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
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _settings(given: list[str]) -> dict[str, Any]:
    if wrong := [entry for entry in given if entry.find("=") < 1]:
        raise ValueError(f"--set: expected name=value, got {wrong[0]!r}.")
    return {name: _value(text) for name, text in (entry.split("=", 1) for entry in given)}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(number) for number in _names(text)]
    except ValueError:
        raise ValueError(f"{option}: expected whole numbers with commas between them, got {text!r}.") from None


def _cases(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        cases = _value(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        kind = type(e) if isinstance(e, OSError) else ValueError
        raise kind(f"--cases: cannot read the file {text!r} ({e}).") from e
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


Transforms = Annotated[
    list[Path],
    typer.Option(
        "-t", "--transform", help="Transform; several in the order in which a fixed point passes through them."
    ),
]


@app.command("register")
def register_scans(
    fixed: Annotated[
        Path | None, typer.Argument(help="The fixed scan: a file, or the folder of a DICOM series.")
    ] = None,
    moving: Annotated[list[Path] | None, typer.Argument(help="The moving scan, or several.")] = None,
    output_dir: Annotated[Path, typer.Option("-o", "--output-dir", help="Folder of the results.")] = Path("registered"),
    pairs: Annotated[Path | None, typer.Option(help="List of pairs, JSON or CSV, in place of the two.")] = None,
    fixed_label: Annotated[Path | None, typer.Option(help="Label map of the fixed scan.")] = None,
    moving_label: Annotated[list[Path], typer.Option(help="Label map of each moving scan.")] = [],  # noqa: B006
    fixed_mask: Annotated[Path | None, typer.Option(help="Where the fixed scan is compared.")] = None,
    fixed_points: Annotated[Path | None, typer.Option(help="Landmarks of the fixed scan, .csv or .fcsv.")] = None,
    moving_points: Annotated[list[Path], typer.Option(help="The same landmarks of each moving scan.")] = [],  # noqa: B006
    initial_transform: Annotated[list[Path], typer.Option(help="Transform to begin with. May be repeated.")] = [],  # noqa: B006
    affine: Annotated[str | None, typer.Option(help="Align the scans first: rigid or affine.")] = None,
    preset: Annotated[str, typer.Option(help="What the scans are of: brain or lung.")] = "brain",
    weights: Annotated[Path | None, typer.Option(help="Trained weights, to start from what they find.")] = None,
    steps: Annotated[str, typer.Option(help="Step limits, coarse to fine, e.g. 60,40,6. [default: the preset's]")] = "",
    tolerance: Annotated[
        float | None, typer.Option(help="Length of a step, in voxels, at which a pair is at rest.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: a GPU if there is one]")] = None,
    transform_format: Annotated[str, typer.Option(help=".nii.gz, .mha, .nrrd or .h5.")] = ".nii.gz",
    save_ddf: Annotated[
        bool, typer.Option("--save-ddf", help="Write the field in voxels too, as MONAI has it.")
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Write a report of each pair, one HTML file.")] = False,
    require_converged: Annotated[
        bool, typer.Option("--require-converged", help="Exit code 3 when a pair did not come to rest.")
    ] = False,
    on_error: Annotated[str, typer.Option(help="When a pair fails: stop, or skip and go on with the others.")] = "stop",
    resume: Annotated[bool, typer.Option("--resume", help="Leave out pairs that are registered already.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Register the moving scan to the fixed one: two files in any space, of any orientation and spacing.

    Exit codes: 0 done, 1 a pair failed and was skipped, 2 bad input, 3 not at rest where --require-converged asks for
    it; 130 and 143 ended by Ctrl-C and by SIGTERM.

    Example: monai-deq register fixed.nii.gz moving.nii.gz -o out --affine rigid --report

    Example: monai-deq register atlas.nii.gz a.nii.gz b.nii.gz -o out --moving-label a_seg.nii.gz --moving-label
    b_seg.nii.gz

    Example: monai-deq register --pairs pairs.csv -o out --preset lung --transform-format .h5
    """
    from monai_deq.apps import RegistrationSettings, register_pairs
    from monai_deq.data import read_pair_list

    given = {"fixed_label": fixed_label, "fixed_mask": fixed_mask, "fixed_keypoints": fixed_points}
    each = {"moving_label": moving_label, "moving_keypoints": moving_points}
    if pairs is not None:
        if fixed or any(given.values()) or any(each.values()) or initial_transform:
            raise ValueError(f"--pairs {pairs} goes without other files: the list names what belongs to each pair.")
        items = read_pair_list(pairs)
    else:
        if fixed is None or not moving:
            raise ValueError("expected the fixed scan and a moving one, or --pairs; see monai-deq register --help.")
        for name, files in each.items():
            if files and len(files) != len(moving):
                option = {"moving_label": "--moving-label", "moving_keypoints": "--moving-points"}[name]
                raise ValueError(f"{option}: expected one for each of {len(moving)} moving scans, got {len(files)}.")
        items = [
            {"fixed": fixed, "moving": scan, **given, **{name: files[i] for name, files in each.items() if files}}
            for i, scan in enumerate(moving)
        ]
        if initial_transform:
            items = [{**item, "initial_transform": list(initial_transform)} for item in items]
    settings = RegistrationSettings(
        preset=preset,
        weights=weights,
        affine=affine,  # type: ignore[arg-type]
        steps=_numbers(steps, "--steps") or None,
        tolerance=tolerance,
        device=device,
        transform_format=transform_format,
        save_ddf=save_ddf,
        report=report,
        overwrite=overwrite,
    )
    results = register_pairs(items, output_dir, settings, on_error, resume)  # type: ignore[arg-type]
    if any("error" in r for r in results):
        raise typer.Exit(1)
    if require_converged and (moving_on := [r for r in results if not r["converged"]]):
        print(
            f"{len(moving_on)} of {len(results)} pairs did not come to rest: {moving_on[0]['verdict']}.",
            file=sys.stderr,
        )
        raise typer.Exit(3)


@app.command("apply")
def apply_to_files(
    moving: Annotated[Path, typer.Argument(help="Image, 4-D series or label map of the moving scan; or points, .csv.")],
    transforms: Transforms,
    output: Annotated[Path, typer.Option("-o", "--output", help="The result, .nii.gz; of points .csv.")],
    reference: Annotated[
        Path | None, typer.Option("-r", "--reference", help="The fixed scan, on whose grid the result lies.")
    ] = None,
    label: Annotated[bool, typer.Option("--label", help="A label map: nearest voxel, exact numbers.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Take an image, a label map or points through transforms, with one interpolation.

    Example: monai-deq apply moving_seg.nii.gz -t out/moving_to_fixed_transform.nii.gz -o seg.nii.gz --label
    """
    from monai_deq.apps import apply_transforms

    path = apply_transforms(moving, transforms, output, reference, label, overwrite)
    print(f"wrote {path}")


@app.command("invert")
def invert_files(
    transforms: Transforms,
    output: Annotated[Path, typer.Option("-o", "--output", help="The inverse: .nii.gz, .mha, .nrrd, .h5; .tfm.")],
    reference: Annotated[
        Path | None, typer.Option("-r", "--reference", help="The moving scan, on whose grid the inverse lies.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Invert transforms: what is written takes the fixed scan to the moving one's space.

    Example: monai-deq invert -t out/moving_to_fixed_transform.nii.gz -r moving.nii.gz -o inverse.nii.gz
    """
    from monai_deq.apps import invert_transform

    print(f"wrote {invert_transform(transforms, output, reference, overwrite)}")


@app.command("check")
def check_data(
    data: Annotated[Path, typer.Argument(help="Folder of OASIS or of a paired Learn2Reg task, or a list of pairs.")],
    spatial_dims: Annotated[int, typer.Option(help="3 for volumes, 2 for slices.")] = 3,
    workers: Annotated[int | None, typer.Option(help="Files read at a time. [default: the number of CPUs]")] = None,
    split_sizes: Annotated[
        str, typer.Option(help="Training, validation, test, e.g. 300,30,44. [default: as trained]")
    ] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what is found as JSON too.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Read all files of a data set, or of a list of pairs, before a training: what is damaged, does not fit or repeats.

    Exit codes: 0 nothing found, 1 findings, 2 bad input.

    Example: monai-deq check DATA --spatial-dims 2 --json findings.json
    """
    from collections import Counter
    from itertools import groupby

    from monai_deq.apps import check_files
    from monai_deq.utils import refuse_existing, write_json

    if json_file is not None and not overwrite:
        refuse_existing([json_file], "Give --overwrite, or another file.")
    findings, scans = check_files(data, spatial_dims, workers, _numbers(split_sizes, "--split-sizes") or None)
    for file, of_file in groupby(findings, lambda finding: finding.file):
        print(file)
        for finding in of_file:
            print(f"  {finding.severity}: {finding.kind}: {finding.what}")
    counts = Counter(finding.kind for finding in findings)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    print(f"{scans} scans, {len(findings)} findings" + (f": {kinds}" if kinds else ""))
    if json_file is not None:
        listed = [finding._asdict() for finding in findings]
        write_json(json_file, {"data": data, "scans": scans, "counts": counts, "findings": listed})
    if findings:
        raise typer.Exit(1)


@app.command("sample")
def write_sample(
    output_dir: OutputDir,
    subjects: Annotated[int, typer.Option(help="Number of subjects, 2 to 999.")] = 2,
) -> None:
    """Write synthetic heads with their label maps, volumes and slices, to try things on.

    Example: monai-deq sample --output-dir two_heads
    """
    from monai_deq.data import write_sample_cohort

    # volumes of 2.5 mm, which register in seconds
    print(f"wrote {write_sample_cohort(output_dir, subjects, (64, 72, 80), (160, 192))}")


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
    steps = (max_steps, random_start_rms, _numbers(table_steps, "--table-steps"))
    converge(bundle_dir, results_dir, names, files, given, *steps, output_dir, overwrite)


@app.command("report")
def report_evaluation(
    summary: Annotated[Path, typer.Argument(help="What an evaluation wrote, <prefix>_summary.json.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The report, .html.")],
    reference: Annotated[
        Path | None, typer.Option(help="The same of another evaluation of these pairs, to be tested against.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write an evaluation as one HTML file: scores, boxes, pictures of the best and the worst pairs.

    Example: monai-deq report eval/evaluation_summary.json -o report.html --reference other/evaluation_summary.json
    """
    from monai_deq.evaluation import write_evaluation_report

    write_evaluation_report(output, summary, reference, overwrite=overwrite)
    print(f"wrote {output}")


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

    size, unrolled = _numbers(spatial_size, "--spatial-size"), _numbers(unrolled_steps, "--unrolled-steps")
    numbers = (size, _numbers(steps, "--steps"), unrolled)
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

    if wrong := [size for size in _names(sizes) if not all(part.isdecimal() for part in size.split("x"))]:
        raise ValueError(f"--sizes: expected sizes such as 64x64x64, got {wrong[0]!r}.")
    shapes = [[int(number) for number in size.split("x")] for size in _names(sizes)] or SIZES
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


def _end(number: int, frame: Any) -> None:
    """End the command, with what it was writing removed: files appear whole or not at all."""
    again = "; register goes on with --resume" if "register" in sys.argv[1:2] else ""
    print(f"stopped by {signal.Signals(number).name}: what was written before is whole{again}.", file=sys.stderr)
    raise SystemExit(128 + number)


def main() -> None:
    """Run the command: an error is one line on stderr that says what to do, with exit code 2; SIGTERM and Ctrl-C end it
    with 143 and 130.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s - %(levelname)s - %(message)s")
    warnings.filterwarnings("ignore", message="monai.networks.blocks.Warp: Using PyTorch native")  # no user's concern
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    try:
        app()
    except (OSError, RuntimeError, ValueError, ImportError) as e:
        if debug:
            raise
        print(f"{type(e).__name__}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
