"""Three small archives as npm packs them, and the data set made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from npm_archives import write_archives, write_packed


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archives(tmp_path_factory.mktemp("archives"))


@pytest.fixture(scope="session")
def packed(archives: Path) -> Path:
    return write_packed(archives, archives / "emoji.safetensors")
