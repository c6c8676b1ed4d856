"""What the distribution contains and needs; requirements.txt pins the versions that we test."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION_FILE = Path(__file__).parent / "feature_jobs" / "__init__.py"
# Read, not imported: the package's dependencies need not be there yet when setup.py runs.
VERSION = re.search(r'^__version__ = "(.+)"$', VERSION_FILE.read_text(), re.MULTILINE).group(1)

setup(
    name="courier-features",
    version=VERSION,
    description="Nightly image features for CTR models: embeddings, cluster IDs and SimScores",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["pipelines*", "courier_model*", "feature_jobs*"]),
    package_data={"pipelines": ["configs/*.toml", "configs/kubernetes/*.yaml", "docs/*.md"]},
    entry_points={
        "console_scripts": [
            "courier = pipelines.cli:main",
            "courier-worker = pipelines.running.worker_boot:main",
        ]
    },
    install_requires=[
        # Lower bounds are what we have run, upper bounds end where a release may break us.
        "apache-beam[gcp]>=2.77,<3",  # not Beam's `torch` extra: it caps torch below our pin
        "click>=8.5,<9",
        # One library under two names. The GPU build works without a GPU too, but is for Linux only.
        "faiss-gpu>=1.15,<2; sys_platform == 'linux'",
        "faiss-cpu>=1.15,<2; sys_platform != 'linux'",
        "google-cloud-storage>=3.17,<4",
        "loky>=3.7,<4",
        "numpy>=2.4,<3",
        "pillow>=12.3,<13",
        "pyarrow>=25,<26",  # Beam wants < 26
        "pydantic>=2.14,<3",
        "safetensors>=0.8,<1",
        "tensorboard>=2.21,<3",  # torch.utils.tensorboard needs it, but torch does not ask for it
        # Minor releases of torch drop what an earlier one deprecated, hence the tight upper bound;
        # torchvision goes with its torch. We run the lower pair on a GPU, the upper one elsewhere.
        "torch>=2.11,<2.15",
        "torchvision>=0.26,<0.30",
        "threadpoolctl>=3.8,<4",
        "tqdm>=4.70,<5",
    ],
    extras_require={
        # The text tower of the CLIP baseline, which nothing else needs.
        "clip": ["transformers>=5.23,<6"],
        # Encoders with a backbone of timm's; the weights come through the client of its hub.
        "timm": ["huggingface-hub>=2.4,<3", "timm>=1.0.31,<1.1"],
        "dev": [
            "duckdb",
            "gcp-storage-emulator",
            "hypothesis",
            "jsonschema",
            "kubernetes-validate",
            "mypy",
            "pandas",
            "polars",
            "pytest",
            "pytest-xdist",
            "pyyaml",
            "ruff",
            "timm",  # as in `timm`, of which `make pins` takes the bounds
            "transformers",  # as in `clip`, likewise
            "xxhash",
        ],
    },
)
