"""What is installed: the wheel's content, the entry points, and the versions that are allowed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import trimtab

ROOT = Path(__file__).parents[1]
PACKAGED = ("guidance", "pipelines", "adapters", "conformance", "evaluation", "scaffold", "training")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules() -> set[str]:
    """The modules that belong into the package, as paths inside it."""
    found = [*ROOT.glob("*.py"), *(path for folder in PACKAGED for path in (ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix() for path in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, so that the build leaves nothing here."""
    copy = tmp_path_factory.mktemp("source") / "trimtab"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "runs", "out", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target), str(copy)]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_nothing_else_but_data_and_metadata(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name.removeprefix("trimtab/") for name in names if name.startswith("trimtab/")}
    assert {name for name in inside if name.endswith(".py")} == modules()
    assert {name for name in names if name.startswith("pytest_trimtab/")} == {"pytest_trimtab/__init__.py"}
    data = {name for name in inside if not name.endswith(".py")}
    model = {path.relative_to(ROOT).as_posix() for path in (ROOT / "models").rglob("*") if path.is_file()}
    template = {path.relative_to(ROOT).as_posix() for path in (ROOT / "scaffold" / "template").rglob("*.in")}
    assert data == {"__init__.pyi", "py.typed", "evaluation/judge.safetensors", *model, *template}
    folders = {re.sub(r"^trimtab-[\d.]+\.", "", name.split("/")[0]) for name in names}
    assert folders == {"trimtab", "pytest_trimtab", "dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_wheel_runs_the_command_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    script = "import trimtab.cli, sys; print(trimtab.__file__); sys.exit(trimtab.cli.main(['plugins', 'list']))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    first, *listing = result.stdout.splitlines()
    assert Path(first).is_relative_to(tmp_path)
    assert any(line.startswith("pag ") for line in listing)


def test_what_the_package_offers_is_imported_when_it_is_first_asked_for() -> None:
    """So that `trimtab --help`, and a mistake in what was typed, take no seconds."""
    program = (
        "import sys, trimtab; from trimtab.cli import build_parser; build_parser();"
        "print(sorted({'torch', 'diffusers', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_that_the_package_offers_is_there() -> None:
    assert all(getattr(trimtab, name) is not None for name in trimtab.__all__)
    assert {"guide", "GuidedPipeline", "Guidance", "parameter", "GuidanceStack"} <= set(trimtab.__all__)


def test_every_folder_with_modules_is_a_listed_package_with_an_init() -> None:
    folders = {Path(name).parent for name in modules()}
    listed = project()["tool"]["setuptools"]["packages"]
    assert {".".join(("trimtab", *folder.parts)) for folder in folders} | {"pytest_trimtab"} == set(listed)
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_the_command_and_the_built_in_guidances_are_entry_points() -> None:
    (command,) = entry_points(group="console_scripts", name="trimtab")
    assert command.value == "trimtab.cli:main"
    own = {
        point.name for point in entry_points(group="trimtab.guidance") if point.dist and point.dist.name == "trimtab"
    }
    assert own == set(project()["project"]["entry-points"]["trimtab.guidance"])
    assert own >= {path.stem for path in (ROOT / "guidance" / "plugins").glob("[!_]*.py")}
    assert all(callable(point.load()) for point in entry_points(group="trimtab.guidance") if point.name in own)


def test_the_pinned_versions_lie_in_the_allowed_ranges() -> None:
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    extras = project()["project"]["optional-dependencies"]
    for text in (*project()["project"]["dependencies"], *extras["test"], *extras["kit"], *extras["evaluate"]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), text


def test_no_dependency_is_torchvision() -> None:
    assert "torchvision" not in (ROOT / "constraints.txt").read_text() + (ROOT / "pyproject.toml").read_text()
