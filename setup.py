# SPDX-License-Identifier: Apache-2.0
"""Packaging of monai_deq."""

from __future__ import annotations

import gzip
import os
import re
import tarfile
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
EXTRAS = ["itk-elastix", "matplotlib>=3.10", "pooch>=1.6", "SimpleITK>=2.4"]
DOCS = ["sphinx>=7.3", "myst-parser>=3", "furo"]
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "monai_deq" / "__init__.py").read_text(), re.M).group(1)  # type: ignore[union-attr]


class Sdist(sdist):
    """With ``SOURCE_DATE_EPOCH`` equal content makes equal bytes: no time, owner or umask of the machine is in them."""

    def make_archive(
        self, base_name: str, format: str, root_dir: Any = None, base_dir: Any = None, **kwargs: Any
    ) -> str:  # type: ignore[override]
        """See setuptools; ``kwargs`` are the owner and the group."""
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, **kwargs)

        def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
            info.mtime, info.uid, info.gid, info.uname, info.gname = int(epoch), 0, 0, "", ""
            info.mode = 0o755 if info.isdir() or info.mode & 0o100 else 0o644
            return info

        path = f"{base_name}.tar.gz"
        with (
            open(path, "wb") as file,
            gzip.GzipFile("", "wb", mtime=int(epoch), fileobj=file) as zipped,
            tarfile.open(fileobj=zipped, mode="w") as archive,
        ):
            archive.add(base_dir, filter=plain)
        return path


setup(
    name="monai_deq",
    version=VERSION,
    description="Equilibrium (DEQ) deformable image registration for MONAI",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    cmdclass={"sdist": Sdist},
    packages=find_packages(include=["monai_deq", "monai_deq.*"]),
    package_data={"monai_deq": ["py.typed"]},
    install_requires=[
        "torch>=2.12",  # differentiates grid_sample twice
        "monai[ignite,nibabel,tensorboard,tqdm,fire,scipy]>=1.6.1",  # fire runs `python -m monai.bundle`
        "torchdeq>=0.1.0",
        "nibabel>=5",
        "numpy>=1.24",
        "pandas>=2.0.3",
        "scipy>=1.15",  # its Wilcoxon test is exact with ties
        "typer>=0.15.4",
    ],
    entry_points={"console_scripts": ["monai-deq = monai_deq.cli:main"]},
    extras_require={
        "download": ["pooch>=1.6"],
        "elastix": ["itk-elastix"],
        "mlflow": ["mlflow-skinny", "sqlalchemy", "alembic", "sqlparse"],  # what --tracking mlflow needs of MLflow
        "figures": ["matplotlib>=3.10"],
        "itk": ["SimpleITK>=2.4"],  # its formats, its transforms, affine alignment
        "test": ["hypothesis", "pytest", "pytest-xdist", "jsonschema", "ruff", "mypy", *EXTRAS, *DOCS],
        "docs": DOCS,
    },
)
