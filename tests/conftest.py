import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared", deadline=None)  # machines are shared and noisy
settings.load_profile("shared")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would only wait
# Some virtual machines advertise AMX and fault on its bfloat16 kernels.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

ROOT = Path(__file__).parents[1]

pytest_plugins = ["pytester", "tests.deprecations"]


@pytest.fixture(scope="session")
def imported():
    """Runs inside this process forget what they import first, and torch bears no second import."""
    from pytest_kvguard.harness.measure import Bench
    from pytest_kvguard.models import load
    from pytest_kvguard.tasks import get_task

    Bench(load("reasoner")).measure(get_task("facts"), [], limit=1)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this package, built as for a release."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [built] = folder.glob("*.whl")
    return built
