"""The tiny pipeline whose images are measured here."""

from __future__ import annotations

import pytest
from zoo.class_conditional import class_conditional

from trimtab.pipelines.fashion.data import CLASS_NAMES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    class_conditional(list(CLASS_NAMES), side=16, prediction_type="v_prediction").save_pretrained(folder)
    return str(folder)
