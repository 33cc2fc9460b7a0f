"""A new plug-in package is complete: it builds, installs, passes its own tests and the kit, and is used by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from fresh import installed

from trimtab import cli, scaffold
from trimtab.guidance.errors import ParameterError

USE = """
import sys, pytest, trimtab
code = pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore"])
import my_guidance
print(my_guidance.__file__)
pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/fashion")
print(type(pipe.add_guidance("my.guidance", scale=0.5)).__name__, pipe("Bag", num_inference_steps=2).images[0].size)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scaffold.write("my-guidance", tmp_path_factory.mktemp("new"))


def test_it_builds_installs_passes_its_tests_and_is_used_by_name(package: Path, tmp_path: Path) -> None:
    python = installed(package, tmp_path)
    done = subprocess.run([str(python), "-c", USE], cwd=package, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, summary, module, use = done.stdout.splitlines()
    assert int(re.match(r"(\d+) passed", summary)[1]) > 40 and "failed" not in summary  # type: ignore[index]
    assert Path(module).is_relative_to(tmp_path)
    assert use == "MyGuidance (32, 32)"


def test_a_package_called_as_its_test_file_is_told_from_it(tmp_path: Path) -> None:
    folder = scaffold.write("test-guidance", tmp_path)
    # Without the kit and the run by name, which want the plug-in installed.
    alone = ["-o", "trimtab_plugins=", "-k", "doubles or refused"]
    command = [sys.executable, "-m", "pytest", "-q", *alone, "tests/test_guidance.py"]
    environment = {**os.environ, "PYTHONPATH": "src"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_it_holds_all_that_a_package_needs(package: Path) -> None:
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert files == {
        ".github/workflows/test.yml",
        ".gitignore",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "src/my_guidance/__init__.py",
        "src/my_guidance/py.typed",
        "tests/conftest.py",
        "tests/test_guidance.py",
    }
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["trimtab.guidance"] == {"my.guidance": "my_guidance:MyGuidance"}
    assert not any(re.search("vendor.?guidance", (package / file).read_text(), re.IGNORECASE) for file in files)


def test_its_code_is_formatted_and_without_a_finding(package: Path) -> None:
    ruff = [sys.executable, "-m", "ruff"]
    if subprocess.run([*ruff, "--version"], capture_output=True).returncode:
        pytest.skip("ruff is not installed as a module here")
    options = ["--isolated", "--line-length", "120", str(package)]
    subprocess.run([*ruff, "format", "--check", *options], check=True)
    subprocess.run([*ruff, "check", "--select", "E,F,I,UP,B,SIM,RUF", "--ignore", "RUF009", *options], check=True)


def test_longer_names_are_spelled_throughout(tmp_path: Path) -> None:
    folder = scaffold.write("acme.soft-light", tmp_path)
    assert folder == tmp_path / "acme-soft-light"
    text = (folder / "src" / "acme_soft_light" / "__init__.py").read_text()
    assert 'name: ClassVar[str] = "acme.soft_light"' in text and "class AcmeSoftLight(Guidance)" in text


@pytest.mark.parametrize("name", ["guidance", "My-Guidance", "my guidance", "../my-guidance", "-my", "my_guidance", ""])
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=re.escape(f"name={name!r}; allowed: ")):
        scaffold.write(name, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_the_command_prints_the_folder_and_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plugins", "new", "my-guidance", "-o", str(tmp_path)]) == 0
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "my-guidance"
    readme = tmp_path / "my-guidance" / "README.md"
    readme.write_text("mine")
    assert cli.main(["plugins", "new", "my-guidance", "-o", str(tmp_path)]) == 2
    assert readme.read_text() == "mine"
    assert cli.main(["plugins", "new", "guidance", "-o", str(tmp_path)]) == 2
    assert "allowed: your own name" in capsys.readouterr().err
    assert cli.main(["plugins", "new", "my-other", "--json", "-o", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert all((Path(told["folder"]) / file).is_file() for file in told["files"]) and "README.md" in told["files"]
