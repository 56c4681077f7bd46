"""The pytest plugin: options, marker, fixtures and the summary. Decides nothing itself."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kvguard import marker, options, values
from pytest_kvguard.errors import InvalidArgument, KVGuardError
from pytest_kvguard.report.progress import reporter
from pytest_kvguard.report.summary import PROPERTY, Summary
from pytest_kvguard.session import CellName, Session

if TYPE_CHECKING:
    from pytest_kvguard.harness.cache import CompressedCache
    from pytest_kvguard.harness.compare import Comparison
    from pytest_kvguard.models import Loaded

SESSION = pytest.StashKey[Session]()
PROBLEMS = pytest.StashKey[list[str]]()
NO_MODEL = pytest.StashKey[bool]()
NO_MODEL_REASON = "the model cannot be loaded; the first test that wants it says why"
REGISTERED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    options.add(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare our own hooks."""
    from pytest_kvguard import hookspecs

    pluginmanager.add_hookspecs(hookspecs)


def pytest_configure(config: pytest.Config) -> None:
    """Read the settings; bad ones end the run before anything is collected."""
    config.addinivalue_line("markers", marker.SIGNATURE)
    config.stash[SESSION] = Session(options.settings(config))
    config.stash[PROBLEMS] = []
    if not options.on_worker(config):
        summary = Summary(config.stash[SESSION].settings.report)
        config.pluginmanager.register(summary, "kvguard-summary")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test item for each policy and ratio of a marked test."""
    mark = metafunc.definition.get_closest_marker(marker.NAME)
    asks = "kv_cell" in metafunc.fixturenames
    if mark is None and not asks:
        return
    session = metafunc.config.stash[SESSION]
    cells: list[CellName] = []
    try:
        cells = _cells(metafunc, mark, session)
    except KVGuardError as problem:
        _note(metafunc, problem)
    if asks:
        metafunc.parametrize("kv_cell", cells, indirect=True, ids=str, scope="function")


def _cells(metafunc: pytest.Metafunc, mark: pytest.Mark | None, session: Session) -> list[CellName]:
    if mark is None:
        raise KVGuardError(f"asks for kv_cell or kv_result but has no @{marker.SIGNATURE}")
    if "kv_cell" not in metafunc.fixturenames:
        raise KVGuardError(
            f"is marked {marker.NAME} but asks for neither kv_result nor kv_cell, so it would "
            f"measure nothing; add kv_result to its arguments"
        )
    plan = marker.plan(mark, session.settings)
    _register(metafunc.config)
    session.check(plan)
    return [CellName(policy, ratio) for policy in plan.policies for ratio in plan.ratios]


def _register(config: pytest.Config) -> None:
    """Take in what other packages add, once."""
    from pytest_kvguard.policies import register_policy
    from pytest_kvguard.session import unregister
    from pytest_kvguard.tasks import register_task

    if config.stash.get(REGISTERED, False):
        return
    for found, register in (
        (config.hook.pytest_kvguard_policies(), register_policy),
        (config.hook.pytest_kvguard_tasks(), register_task),
    ):
        for factories in found:
            if not isinstance(factories, Mapping):
                raise InvalidArgument(f"a hook must return factories by name, got {factories!r}")
            for name, factory in factories.items():
                register(name, factory)
                config.add_cleanup(partial(unregister, name))
    config.stash[REGISTERED] = True


def _note(metafunc: pytest.Metafunc, problem: KVGuardError) -> None:
    """Report a marker that cannot be used: once for the run, or under xdist for its file."""
    config = metafunc.config
    if options.on_worker(config):  # an error that ends a worker would hide its message
        raise pytest.Collector.CollectError(f"{metafunc.definition.nodeid}: {problem}")
    config.stash[PROBLEMS].append(f"{metafunc.definition.nodeid}: {problem}")


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    """End the run on markers that cannot be used, before anything is measured."""
    if problems := config.stash[PROBLEMS]:
        rest = f" (and {len(problems) - 1} more tests)" if problems[1:] else ""
        raise pytest.UsageError(problems[0] + rest)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note which cells the selected tests want: those of a task are run together."""
    if session.config.stash[PROBLEMS]:  # pytest gets here even so, with items that have no cell
        return
    ours = session.config.stash[SESSION]
    for item in session.items:
        mark = item.get_closest_marker(marker.NAME)
        callspec = getattr(item, "callspec", None)
        if mark is not None and callspec is not None and "kv_cell" in callspec.params:
            ours.ask(marker.plan(mark, ours.settings), callspec.params["kv_cell"])
    worker = hasattr(session.config, "workerinput")  # which must not end: kv_model fails instead
    if not (worker or session.config.option.collectonly):
        _require_model(session)


def _wants_our_model(item: pytest.Item) -> bool:
    """Whether a test uses the model that the settings name, not one of the user's own."""
    fixtures = getattr(item, "_fixtureinfo", None)
    found = getattr(fixtures, "name2fixturedefs", {}).get("kv_model")
    return bool(found and found[-1].func.__module__ == __name__)


def _require_model(session: pytest.Session) -> None:
    """End the run before anything is measured, if tests want a model that cannot be had."""
    if not any(map(_wants_our_model, session.items)):
        return
    try:
        session.config.stash[SESSION].require_model()
    except KVGuardError as problem:
        raise pytest.UsageError(f"{type(problem).__name__}: {problem}") from None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let a model that cannot be loaded fail the first test that wants it, not each of them."""
    if item.config.stash.get(NO_MODEL, False) and _wants_our_model(item):
        pytest.skip(NO_MODEL_REASON)


@pytest.fixture(scope="session")
def kv_model(request: pytest.FixtureRequest) -> "Loaded":
    """The model under test, as ``--kv-model`` names it; override it to bring your own.

    An override returns ``pytest_kvguard.models.wrap(model, tokenizer, name="mine")``.
    """
    try:
        with _plainly():
            return request.config.stash[SESSION].load()
    except pytest.fail.Exception:
        request.config.stash[NO_MODEL] = True
        if _another_worker_said_it(request):
            pytest.skip(NO_MODEL_REASON)
        raise


def _another_worker_said_it(request: pytest.FixtureRequest) -> bool:
    """Note that the model cannot be loaded; whether another worker of this run has before."""
    if not hasattr(request.config, "workerinput"):
        return False
    shared = request.getfixturevalue("tmp_path_factory").getbasetemp().parent
    try:
        (shared / "kvguard-no-model").mkdir()
    except FileExistsError:
        return True
    return False


@pytest.fixture
def kv_cell(request: pytest.FixtureRequest) -> CellName:
    """The policy and keep ratio of this test item."""
    cell: CellName = request.param
    return cell


@pytest.fixture
def kv_result(
    request: pytest.FixtureRequest, kv_model: "Loaded", kv_cell: CellName
) -> "Comparison":
    """What compression did to the marked task, as a Comparison; skips what the model cannot do."""
    mark = request.node.get_closest_marker(marker.NAME)
    session = request.config.stash[SESSION]
    return _measure(request, kv_model, marker.plan(mark, session.settings), kv_cell)


@pytest.fixture
def kvguard(request: pytest.FixtureRequest, kv_model: "Loaded") -> "Callable[..., Comparison]":
    """Compare any task under any policy: ``kvguard("retrieval", policy="snapkv", ratio=0.5)``.

    Takes a task's name or a Task, and like the marker ``max_drop`` and ``limit``.
    """

    def compare(task: Any, *, policy: str, ratio: float, **asked: Any) -> "Comparison":
        __tracebackhide__ = True
        mark = marker.kv_sensitivity(task, policies=policy, ratios=ratio, **asked).mark
        session = request.config.stash[SESSION]
        try:
            _register(request.config)
            plan = marker.plan(mark, session.settings)
            session.check(plan)
            cell = CellName(marker.parse_policy(policy), values.keep_ratio(str(ratio)))
        except KVGuardError as problem:  # the caller's line is what matters
            raise problem.with_traceback(None) from None
        return _measure(request, kv_model, plan, cell)

    return compare


@pytest.fixture
def kv_cache(
    request: pytest.FixtureRequest, kv_model: "Loaded"
) -> "Callable[..., CompressedCache]":
    """Compress a prompt's cache: ``kv_cache(text, policy="h2o|kivi", ratio=0.5)``.

    Takes a text, messages, parts or a task's sample; and ``units``, ``protocol``, ``protect`` and
    ``max_new_tokens``, see `pytest_kvguard.harness.cache.compress`. Returns a CompressedCache,
    which says what is held, goes on step by step, and answers.
    """
    from pytest_kvguard.harness.cache import compress
    from pytest_kvguard.policies import get_policy

    def cache(given: Any, *, policy: str, ratio: float, **asked: Any) -> "CompressedCache":
        __tracebackhide__ = True
        try:
            _register(request.config)
            keep = values.keep_ratio(str(ratio))
            return compress(kv_model, given, get_policy(policy), keep, **asked)
        except KVGuardError as problem:  # the caller's line is what matters
            raise problem.with_traceback(None) from None

    return cache


def _measure(
    request: pytest.FixtureRequest, loaded: "Loaded", plan: marker.Plan, cell: CellName
) -> "Comparison":
    """Measure a cell and put it on record; the record travels with the test's report."""
    session = request.config.stash[SESSION]
    with _plainly():
        found = session.measure(loaded, plan, cell, reporter(request.config))
    request.node.user_properties.append((PROPERTY, json.dumps(found.cell)))
    if found.weakness is not None:
        if session.settings.mode == "proved":
            pytest.fail(found.weakness, pytrace=False)
        pytest.skip(found.weakness)
    assert found.comparison is not None  # only a weak model leaves none
    return found.comparison


@contextmanager
def _plainly() -> Iterator[None]:
    """Let what went wrong on purpose fail a test in one line, without our traceback."""
    try:
        yield
    except KVGuardError as problem:
        said = f"{type(problem).__name__}: {problem}"
        raise pytest.fail.Exception(said, pytrace=False) from None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the cells of a test on one worker, so that they share their prefills.

    Only in runs that name one of our options: how other runs are spread is not our business.
    """
    if config.getoption("dist") != "load" or not options.any_given(config):
        return None
    from pytest_kvguard.scheduling import CellScheduling

    return CellScheduling(config, log)
