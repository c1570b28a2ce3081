# SPDX-License-Identifier: Apache-2.0
"""Packaging of monai_deq."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
EXTRAS = ["itk-elastix", "matplotlib>=3.10", "pooch", "SimpleITK>=2.3"]
DOCS = ["sphinx>=7.3", "myst-parser>=3", "furo"]
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "monai_deq" / "__init__.py").read_text(), re.M).group(1)  # type: ignore[union-attr]

setup(
    name="monai_deq",
    version=VERSION,
    description="Equilibrium (DEQ) deformable image registration for MONAI",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["monai_deq", "monai_deq.*"]),
    package_data={"monai_deq": ["py.typed"]},
    install_requires=[
        "torch>=2.12",  # differentiates grid_sample twice
        "monai[ignite,nibabel,tensorboard,tqdm,fire,scipy]>=1.6.1",  # fire runs `python -m monai.bundle`
        "torchdeq>=0.1.0",
        "numpy",
        "pandas",
        "scipy",
        "typer",
    ],
    entry_points={"console_scripts": ["monai-deq = monai_deq.cli:main"]},
    extras_require={
        "download": ["pooch"],
        "elastix": ["itk-elastix"],
        "mlflow": ["mlflow-skinny", "sqlalchemy", "alembic", "sqlparse"],  # what --tracking mlflow needs of MLflow
        "figures": ["matplotlib>=3.10"],
        "itk": ["SimpleITK>=2.3"],  # its formats, its transforms, affine alignment
        "test": ["hypothesis", "pytest", "pytest-xdist", "jsonschema", "ruff", "mypy", *EXTRAS, *DOCS],
        "docs": DOCS,
    },
)
