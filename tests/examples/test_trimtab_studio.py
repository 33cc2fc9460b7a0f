"""The example package installs from its wheel and passes its own tests and the conformance kit there."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from fresh import installed

PACKAGE = Path(__file__).parents[2] / "examples" / "trimtab-studio"

USE = """
import re, sys, pytest, trimtab
code = pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore"])
names = {}
for block in re.findall(r"```python\\n(.*?)```", open("README.md").read(), flags=re.DOTALL):
    exec(block, names)
print(names["image"].size, *names["pipe"].guidances)
sys.exit(code)
"""


def test_it_installs_and_passes_its_tests_and_the_kit(tmp_path: Path) -> None:
    python = installed(PACKAGE, tmp_path)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([str(python), "-c", USE], cwd=PACKAGE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, summary, use = done.stdout.splitlines()
    assert int(re.match(r"(\d+) passed", summary)[1]) > 90 and "failed" not in summary  # type: ignore[index]
    assert use == "(32, 32) studio.palette studio.symmetry"


def test_it_uses_the_public_interface_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        imported = re.findall(r"^(?:from|import) (trimtab(?!_studio)[\w.]*)", path.read_text(), re.MULTILINE)
        assert set(imported) <= {"trimtab", "trimtab.conformance"}, path
