"""The built wheel carries its types: installed elsewhere, a user's file is checked against it."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

USER = """
from pytest_kvguard import Comparison, Policy, check_policy, get_policy, kv_sensitivity


@kv_sensitivity("facts", policies=["snapkv"], ratios=[0.5], max_drop=0.2, limit=24)
def test_facts_survive(kv_result: Comparison) -> None:
    assert kv_result.holds, kv_result.reason
    assert kv_result.dp + 0.5 > 0


def test_it_obeys_the_laws() -> None:
    policy: Policy = get_policy("snapkv(window=16)")
    check_policy(policy, max_examples=20)
"""


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment that holds our wheel and pytest, and nothing else."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    found = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(found), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    [packages] = home.glob("lib/python*/site-packages")
    installed = Path(pytest.__file__).parents[1]
    for name in ("pytest", "_pytest"):  # as they are here, for tests fetch nothing
        (packages / name).symlink_to(installed / name)
    return found


def checked(python: Path, folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_user.py").write_text(text, encoding="utf-8")
    where = [f"--cache-dir={python.parents[1] / 'cache'}", f"--python-executable={python}"]
    mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file=", *where, "test_user.py"]
    elsewhere = {name: os.environ[name] for name in os.environ.keys() - {"PYTHONPATH", "MYPYPATH"}}
    return subprocess.run(mypy, cwd=folder, env=elsewhere, capture_output=True, text=True)


def test_a_user_s_file_is_checked_against_the_installed_package(python, tmp_path):
    result = checked(python, tmp_path, USER)
    assert result.stdout == "Success: no issues found in 1 source file\n", result.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("dp + 0.5", 'dp + "a tenth"', '"float" and "str"'),
        ("ratios=[0.5]", 'ratios="half"', 'Argument "ratios"'),
        ("kv_result.holds", "kv_result.hold", 'has no attribute "hold"'),
        ('get_policy("snapkv(window=16)")', "get_policy(16)", 'Argument 1 to "get_policy"'),
    ],
)
def test_a_wrong_use_of_it_is_found(python, tmp_path, right, wrong, said):
    assert right in USER
    result = checked(python, tmp_path, USER.replace(right, wrong))
    assert said in result.stdout
    assert result.stdout.endswith("Found 1 error in 1 file (checked 1 source file)\n")
