"""Policies of other packages: by entry point, and behind the name of a source."""

import sys

import pytest

from pytest_kvguard.errors import InvalidArgument, Unavailable, UnknownName
from pytest_kvguard.policies import get_policy, sources
from pytest_kvguard.specs import Spec

MODULE = """
from dataclasses import replace
from pytest_kvguard.policies import get_policy

def theirs(sinks: int = 2):
    return replace(get_policy("streaming_llm"), name="theirs", params={"sinks": sinks})

def snapkv():
    raise AssertionError("a name of ours is never looked up")

def nothing():
    return None

number = 3
"""
ENTRY_POINTS = """
[pytest_kvguard.policies]
theirs = kv_theirs:theirs
snapkv = kv_theirs:snapkv
nothing = kv_theirs:nothing
number = kv_theirs:number
absent = kv_theirs:absent
broken = kv_not_there:policy
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Another package, installed but not imported."""
    (tmp_path / "kv_theirs.py").write_text(MODULE, encoding="utf-8")
    about = tmp_path / "kv_theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kv-theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("kv_theirs", None)


@pytest.mark.usefixtures("package")
def test_a_policy_of_another_package_is_made_like_any_other():
    policy = get_policy("theirs(sinks=3)")
    assert (policy.name, policy.params) == ("theirs", {"sinks": 3})
    assert get_policy("snapkv+theirs@0.5").name == "snapkv+theirs"


@pytest.mark.usefixtures("package")
def test_another_package_is_imported_when_its_policy_is_asked_for_and_not_before():
    assert get_policy("snapkv").name == "snapkv"
    with pytest.raises(UnknownName):
        get_policy("snapkw")
    assert "kv_theirs" not in sys.modules
    get_policy("theirs")
    assert "kv_theirs" in sys.modules


@pytest.mark.usefixtures("package")
def test_the_names_of_other_packages_are_among_those_known():
    with pytest.raises(UnknownName, match=r"did you mean 'theirs'\? known: .*, theirs, tova"):
        get_policy("their")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("theirs(x=1)", UnknownName, "unknown parameter of theirs 'x'; known: sinks"),
        ("broken", Unavailable, "'broken' of kv-theirs, kv_not_there:policy, cannot be imported"),
        ("absent", Unavailable, "cannot be imported: AttributeError: module 'kv_theirs' has no"),
        ("nothing", InvalidArgument, "kv_theirs:nothing, must be a factory of a Policy, got None"),
        ("number", InvalidArgument, "kv_theirs:number, must be a factory of a Policy, got 3"),
    ],
)
def test_what_another_package_does_wrong_is_said_with_its_name(name, kind, message):
    with pytest.raises(kind, match=message):
        get_policy(name)


def test_without_that_package_the_name_is_unknown():
    with pytest.raises(UnknownName, match="unknown policy 'theirs'"):
        get_policy("theirs")


def test_a_name_behind_a_colon_is_made_by_the_source_before_it(monkeypatch):
    asked = []

    def source(spec):
        asked.append(spec)
        return get_policy("knorm")

    monkeypatch.setitem(sources.POLICY_SOURCES, "elsewhere", source)
    assert get_policy("elsewhere:Knorm(window=3)+h2o@0.5").name == "knorm+h2o"
    assert asked == [Spec("Knorm", {"window": 3})]


def test_a_source_nobody_knows_is_named():
    with pytest.raises(UnknownName, match="unknown source of policies 'nowhere'; known: "):
        get_policy("nowhere:Knorm")


@pytest.mark.usefixtures("package")
def test_a_name_that_two_packages_give_is_refused_with_both(tmp_path):
    about = tmp_path / "kv_rival-2.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kv-rival\nVersion: 2.0\n")
    (about / "entry_points.txt").write_text("[pytest_kvguard.policies]\ntheirs = kv_rival:mine\n")
    with pytest.raises(InvalidArgument, match=r"kv-(rival|theirs).* and .*kv-(rival|theirs)"):
        get_policy("theirs")
