# SPDX-License-Identifier: Apache-2.0
"""A bundle in the layout of MONAI's Model Zoo."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from monai_deq.networks import describe, load_network, read_record
from monai_deq.utils import refuse_existing, replace_file

__all__ = ["write_zoo_package"]

#: what the Zoo's current schema asks for in ``metadata.json``
REQUIRED_METADATA: tuple[str, ...] = ("schema", "version", "changelog", "monai_version", "pytorch_version")
REQUIRED_METADATA += ("numpy_version", "required_packages_version", "task", "description", "authors", "copyright")
REQUIRED_METADATA += ("network_data_format",)
_WORKFLOWS = ("train", "evaluate", "inference")
#: overlays for several processes, one for each workflow, which the Zoo knows by these names
_MULTI_GPU = tuple(f"multi_gpu_{workflow}.json" for workflow in _WORKFLOWS)
#: files above this are not taken into the Zoo's repository, but fetched from where ``large_files.yml`` says
_LARGEST_FILE = 25 * 2**20


def write_zoo_package(
    bundle_dir: str | Path,
    weights: str | Path,
    output_dir: str | Path,
    name: str | None = None,
    overlays: Sequence[str | Path] = (),
    weights_url: str | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Write a trained bundle of this repository in the layout of MONAI's Model Zoo, ``<output_dir>/<name>`` with
    ``configs/``, ``docs/``, ``models/`` and ``LICENSE``, and as ``<name>_v<version>.zip`` beside it. Both appear whole
    or not at all.

    Args:
        bundle_dir: folder of the bundle.
        weights: the trained weights, with their record beside them (``model.json``).
        output_dir: folder that the package goes to.
        name: its name. Defaults to the folder's with ``_deq_registration``.
        overlays: configuration files that become a part of the package's own, such as ``slices.json``; a relative one
            lies in the bundle's folder or else in the current one. Of a file ``metadata_slices.json`` beside it
            the entries take the place of those of the metadata.
        weights_url: address that the weights can be fetched from, for ``large_files.yml``. Weights of more than 25 MiB
            need it, and are then left out.
        overwrite: replace an existing package, which is ``FileExistsError`` else.

    Returns:
        The package's folder.

    Raises:
        FileNotFoundError: When a part of the bundle, the weights or their record are not there.
        ValueError: When the metadata lack an entry, or the weights do not fit, or are too large without an address.
    """
    bundle_dir, weights, output_dir = Path(bundle_dir), Path(weights), Path(output_dir)
    parts = [*(f"{w}.json" for w in _WORKFLOWS), *_MULTI_GPU, "metadata.json"]
    parts += ["LICENSE", "docs/README.md", "docs/data_license.txt"]
    overlays = [overlays] if isinstance(overlays, (str, Path)) else list(overlays)
    overlay_files = [bundle_dir / p if (bundle_dir / p).is_file() else Path(p) for p in overlays]
    for file in [*(bundle_dir / part for part in parts), weights, weights.with_suffix(".json"), *overlay_files]:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there, the package needs it.")
    network = load_network(weights)  # refuses what is none, or does not fit its record
    metadata = _metadata(bundle_dir, overlay_files)
    _check_dimensions(weights, network, metadata)
    name = f"{bundle_dir.resolve().name}_deq_registration" if name is None else name
    if not name or name != Path(name).name or name.startswith("."):
        raise ValueError(f"name: expected that of a folder, got {name!r}.")
    if weights_url is not None and not re.match(r"https?://[^/]", weights_url):
        raise ValueError(f"weights_url: expected an address that begins with https:// or http://, got {weights_url!r}.")
    package, archive = output_dir / name, output_dir / f"{name}_v{metadata['version']}.zip"
    if not overwrite:
        refuse_existing([package, archive], "Replace it with --overwrite, or name another --output-dir.")
    large = weights.stat().st_size > _LARGEST_FILE
    if large and not weights_url:
        raise ValueError(
            f"{weights} has {weights.stat().st_size / 2**20:.0f} MiB, the Zoo takes files of up to 25: put it where it "
            "can be fetched from and give that address as weights_url."
        )

    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=f".{name}-") as folder:
        root = Path(folder) / name
        for sub in ("configs", "docs", "models"):
            (root / sub).mkdir(parents=True)
        for workflow in _WORKFLOWS:
            config = ConfigParser.load_config_files([bundle_dir / f"{workflow}.json", *overlay_files])
            # found also where the weights' folder is not: monai.bundle.load does not tell it
            config["network_def"] = describe(network)
            _write_json(root / "configs" / f"{workflow}.json", config)
        for part in (*_MULTI_GPU, "logging.conf"):
            if (bundle_dir / part).is_file():
                shutil.copyfile(bundle_dir / part, root / "configs" / part)
        _write_json(root / "configs" / "metadata.json", metadata)
        if (bundle_dir / "methods").is_dir():
            shutil.copytree(bundle_dir / "methods", root / "configs" / "methods")
        # the bundle's own page, with the paths of the package
        page = (bundle_dir / "docs" / "README.md").read_text(encoding="utf-8")
        page = page.replace(f"bundles/{bundle_dir.resolve().name}", "configs")
        (root / "docs" / "README.md").write_text(page, encoding="utf-8")
        for part in ("docs/data_license.txt", "LICENSE"):
            shutil.copyfile(bundle_dir / part, root / part)
        read_record(weights).write(root / "models" / "model.json")
        if large:
            digest = hashlib.md5(weights.read_bytes(), usedforsecurity=False).hexdigest()
            entry = {"path": "models/model.pt", "url": weights_url, "hash_val": digest, "hash_type": "md5"}
            _write_json(root / "large_files.yml", {"large_files": [entry]})  # YAML takes JSON too
        else:
            shutil.copyfile(weights, root / "models" / "model.pt")
        with replace_file(archive) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as zipped:
            for path in sorted(p for p in root.rglob("*") if p.is_file()):
                zipped.write(path, Path(name) / path.relative_to(root))
        if package.exists():
            package.rename(Path(folder) / "replaced")
        os.replace(root, package)
    logging.getLogger("monai_deq").info(f"wrote {package} and {archive}")
    return package


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def _check_dimensions(weights: Path, network: torch.nn.Module, metadata: dict[str, Any]) -> None:
    """The metadata are of images of two or three dimensions, and so are the weights."""
    own = max(p.ndim for p in network.parameters()) - 2
    expected = len(metadata["network_data_format"]["outputs"]["pred"]["spatial_shape"])
    if own != expected:
        raise ValueError(
            f"{weights} are of a {own}-D network, the metadata of a {expected}-D one: name the configuration that they "
            "were trained with in overlays, such as slices.json."
        )


def _metadata(bundle_dir: Path, overlays: Sequence[Path]) -> dict[str, Any]:
    """The metadata with those of the overlays, checked."""
    parser = ConfigParser(ConfigParser.load_config_file(bundle_dir / "metadata.json"))
    for overlay in overlays:
        more = overlay.with_name(f"metadata_{overlay.name}")
        if more.is_file():
            parser.update(ConfigParser.load_config_file(more))
    metadata: dict[str, Any] = parser.get()  # type: ignore[assignment]
    absent = [key for key in REQUIRED_METADATA if not metadata.get(key)]
    if absent:
        raise ValueError(f"{bundle_dir / 'metadata.json'} lacks {', '.join(map(repr, absent))}.")
    if metadata["version"] not in metadata["changelog"]:
        raise ValueError(
            f"{bundle_dir / 'metadata.json'}: version {metadata['version']} has no entry in the changelog, it has "
            f"{', '.join(metadata['changelog'])}."
        )
    return metadata
