"""Runs the slower paths of a CPU of AVX2, in a process that is told to be on one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from courier_model.encoder import build_encoder, embed
from feature_jobs.codebooks import kernels
from feature_jobs.codebooks.nearest import CentreSearch

ROOT = Path(__file__).parents[1]
NUMPY_HAS = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
# On CPUs that are not x86, these change nothing.
OF_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": " ".join(
        name for name in NUMPY_HAS if name.startswith(("X86_V4", "AVX512"))
    ),
}
Found = dict[str, np.ndarray]


def find() -> Found:
    """Searches centres by each kernel, and embeds images together and one of them alone."""
    rng, found = np.random.default_rng(0), Found()
    centres = rng.standard_normal((150, 256)).astype(np.float32)
    rows = centres[rng.integers(0, 150, 300)] + rng.standard_normal((300, 256), np.float32) / 2
    rows[:150] = (centres + centres[::-1]) / 2  # halfway
    for kernel in kernels.present():
        place, *distances = CentreSearch(centres, kernel).nearest(rows, second=True)
        found[kernel.name] = np.column_stack([place, *distances])
    encoder = build_encoder("resnet18", "random", input_size=32).eval()
    for weights in encoder.parameters():  # torch draws other ones on another CPU
        if weights.ndim > 1:
            drawn = rng.standard_normal(weights.shape, np.float32) * weights[0].numel() ** -0.5
            weights.data.copy_(torch.from_numpy(drawn))
    images = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    for name, some in (("together", images), ("alone", images[4:5])):
        found[name] = embed(encoder, some, 6, torch.device("cpu"), "fp32")
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    """Returns what this CPU finds, and what it finds as one of AVX2."""
    path = tmp_path_factory.mktemp("cpu") / "found.npz"
    work = "import sys, numpy; from tests import test_other_cpus as t; print(t.vectors_of_torch())"
    work += "; numpy.savez(sys.argv[1], **t.find())"
    done = subprocess.run(
        [sys.executable, "-c", work, path],
        env=os.environ | OF_AVX2, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    if torch.cpu.get_capabilities().get("avx2"):
        assert done.stdout.strip() == "AVX2"
    return find(), dict(np.load(path))


def vectors_of_torch() -> str:
    return torch.backends.cpu.get_cpu_capability()


def test_each_kernel_of_each_cpu_finds_the_same_centres_and_the_same_bits(
    both: tuple[Found, Found],
) -> None:
    for found in both:
        kinds = {"float32", "bfloat16", "int8"} & set(found)
        assert {"float32", "bfloat16"} <= kinds
        for kind in kinds:
            assert found[kind].tobytes() == both[0]["float32"].tobytes()


def test_on_each_cpu_an_embedding_depends_on_its_image_alone_and_differs_little(
    both: tuple[Found, Found],
) -> None:
    here, there = both
    assert np.abs(here["together"][0] - here["together"][1:]).max(axis=1).min() > 0.01
    for found in both:
        assert np.abs(found["alone"] - found["together"][4]).max() < 1e-6
    # Of components below 1, through eighteen layers of float32.
    assert np.abs(here["together"] - there["together"]).max() < 1e-5
