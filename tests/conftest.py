"""What every test shares: the hypothesis profile, golden cases and skipping without a GPU.

Profiles: dev (30 examples, random), ci (100, derandomised; chosen when ``CI`` is set) and nightly (1000);
``HYPOTHESIS_PROFILE`` names one. The number of threads is torch's own choice, ``OMP_NUM_THREADS`` changes it; under
pytest-xdist (``make test`` runs two workers) it is one.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import golden_cases

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=30, **SHARED)
settings.register_profile("ci", max_examples=100, derandomize=True, **SHARED)
settings.register_profile("nightly", max_examples=1000, **SHARED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.fixture
def golden():
    """Read one golden case: ``tensors, meta = golden("rope_a")``."""
    return golden_cases.golden


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")
