"""Fixtures shared by every test: one thread, fixed seeds, and the tiny pipelines of `zoo` on the import path."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
# How fast the first examples are drawn says something of the machine, nothing of the code.
settings.register_profile("trimtab", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trimtab")


def pytest_collection_finish() -> None:
    """What has been imported stays: a garbage collector that looks through it time and again takes a quarter longer."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Fix every global random state before a test, so that no test depends on the one before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With another number of threads a sum may round differently, here as in the processes that are started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
