"""Pytest's side of the conformance kit: option `--trimtab-plugin`, setting `trimtab_plugins`, a hook and a fixture.

This package stands beside `trimtab` because pytest imports it in every session: nothing of trimtab (or torch) is
imported before a plug-in is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trimtab.conformance import Example, Stage

CHECKS = ("trimtab.conformance.checks.effect", "trimtab.conformance.checks.conduct")
OPTION, SETTING = "--trimtab-plugin", "trimtab_plugins"
FOLDER = "trimtab-conformance/"
"""What the ids of all checks begin with."""
MEMORY = pytest.StashKey[dict[str, dict[str, str]]]()
"""What the module and the class of each plug-in held before anything ran, by its name."""


class Hooks:
    """What the kit asks of a `conftest.py`."""

    @pytest.hookspec(firstresult=True)
    def pytest_trimtab_example(self, name: str, pipe: Any) -> Example | None:
        """How the plug-in `name` is used on the tiny pipeline `pipe`; `None` for its default parameters."""

    @pytest.hookspec(firstresult=True)
    def pytest_trimtab_stages(self, name: str) -> Sequence[Stage] | None:
        """Tiny pipelines on which the plug-in `name` is checked in place of the kit's; `None` for those."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trimtab")
    group.addoption(
        OPTION,
        action="append",
        default=[],
        metavar="NAME",
        help="check that this guidance keeps trimtab's promises, and run nothing else unless it is named (repeatable)",
    )
    parser.addini(SETTING, type="args", default=[], help="guidances that are checked as a part of this test suite")


def names_of(config: pytest.Config) -> list[str]:
    """The plug-ins to be checked."""
    return list(dict.fromkeys([*config.getoption(OPTION), *config.getini(SETTING)]))


def pytest_configure(config: pytest.Config) -> None:
    if not (names := names_of(config)):
        return
    config.option.trimtab_checks = [argument for argument in config.args if argument.startswith(FOLDER)]
    config.args = [argument for argument in config.args if not argument.startswith(FOLDER)]
    if importlib.util.find_spec("hypothesis") is None:
        raise pytest.UsageError(f"{OPTION} draws parameters with hypothesis: pip install 'trimtab[kit]'")
    from trimtab.guidance import listing
    from trimtab.guidance.errors import UnknownGuidanceError

    config.stash[MEMORY] = {}
    for name in names:
        try:
            status = listing.status(name)
        except UnknownGuidanceError as error:
            raise pytest.UsageError(f"{OPTION} {name}: {error}") from None
        if status["status"] != "ok":
            raise pytest.UsageError(f"{OPTION} {name}: it is {status['status']}.\n{status['error']}")
    if config.getoption(OPTION) and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note what each plug-in's module holds before the first check runs it."""
    memory = item.config.stash.get(MEMORY, None)
    if memory is None or not item.nodeid.startswith(FOLDER):
        return
    from trimtab.conformance.fingerprint import of_class
    from trimtab.guidance import registry
    from trimtab.guidance.base import Guidance

    for name in names_of(item.config):
        if name not in memory:
            memory[name] = of_class(registry.find(name), Guidance)


class Checks(pytest.Module):
    """A module of checks, wherever it is installed and however that place looks to pytest's collection."""

    def _getobj(self) -> Any:
        return importlib.import_module(self.name)


@pytest.hookimpl(tryfirst=True)  # so that -k and -m choose among the checks too
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    if not names_of(config):
        return
    asked = list(config.option.trimtab_checks)
    chosen: list[pytest.Item] = []
    for name in CHECKS:
        path = Path(str(importlib.import_module(name).__file__))
        nodeid = f"{FOLDER}{path.stem}"
        found = list(session.genitems(Checks.from_parent(session, path=path, name=name, nodeid=nodeid)))
        chosen += [item for item in found if not asked or any(item.nodeid.startswith(one) for one in asked)]
    for one in asked:
        if not any(item.nodeid.startswith(one) for item in chosen):
            raise pytest.UsageError(f"{one}: there is no such check; --collect-only -q lists them.")
    items.extend(chosen)


def stages_of(config: pytest.Config, name: str) -> Sequence[Stage]:
    """The pipelines on which a plug-in is checked."""
    from trimtab.conformance.stages import STAGES

    own: Sequence[Stage] | None = config.hook.pytest_trimtab_stages(name=name)
    return own or STAGES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__ not in CHECKS:
        return
    names = names_of(metafunc.config)
    if "stage" in metafunc.fixturenames:
        pairs = [(name, stage) for name in names for stage in stages_of(metafunc.config, name)]
        metafunc.parametrize(("plugin", "stage"), pairs, ids=[f"{name}-{stage.name}" for name, stage in pairs])
    elif "plugin" in metafunc.fixturenames:
        metafunc.parametrize("plugin", names)


@pytest.fixture(scope="session")
def example_of(pytestconfig: pytest.Config) -> Any:
    """The example of a plug-in on a pipeline, from the `conftest.py` that gives one."""
    return lambda name, pipe: pytestconfig.hook.pytest_trimtab_example(name=name, pipe=pipe)


@pytest.fixture
def subject(plugin: str, stage: Any, example_of: Any) -> Any:
    """A plug-in on one of the kit's pipelines."""
    from trimtab.conformance.subject import Subject

    return Subject(plugin, stage, example_of)


@pytest.fixture
def subjects(plugin: str, example_of: Any, pytestconfig: pytest.Config) -> list[Any]:
    """A plug-in on each of the kit's pipelines."""
    from trimtab.conformance.subject import Subject

    return [Subject(plugin, stage, example_of) for stage in stages_of(pytestconfig, plugin)]


@pytest.fixture
def memory(plugin: str, pytestconfig: pytest.Config) -> dict[str, str]:
    """What the plug-in's module and class held before anything ran."""
    return pytestconfig.stash[MEMORY][plugin]


@pytest.fixture
def isolated_plugins() -> Iterator[Any]:
    """Within the test no plug-in exists but those registered with it: `isolated_plugins(MyGuidance)`."""
    from trimtab.guidance import registry

    with registry.isolated():
        yield registry.register
