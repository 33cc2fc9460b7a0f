"""A fresh environment in which a package is installed from its wheel, as a user installs it, but without a network."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path


def installed(package: Path, folder: Path) -> Path:
    """Build the wheel of `package`, install it into a new environment that sees this one's packages; its interpreter.

    Args:
        package: the source folder, of which a copy is built, as a build leaves files behind.
        folder: empty, for what is made.
    """
    source, wheels, environment = folder / "source", folder / "wheels", folder / "environment"
    subprocess.run(["cp", "-r", str(package), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(wheels), str(source)],
        check=True,
        capture_output=True,
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    site = next(environment.glob("lib/python*/site-packages"))
    outer = sysconfig.get_path("purelib")
    site.joinpath("outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n")
    wheel = next(wheels.glob("*.whl"))
    subprocess.run([*pip, "--python", str(python), "install", *offline, str(wheel)], check=True, capture_output=True)
    return python
