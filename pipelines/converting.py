"""Pipelines that use `scheduler.step` to turn predictions into clean estimates, before the step itself (Cosmos 1).

The rows go through the scheduler as they are, for its `pred_original_sample`; what they are combined to is given to the
step proper in place of a prediction. With a single row there is nothing to combine, and it is guided at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..guidance.base import Guidance
from ..guidance.errors import UnsupportedPipelineError
from .call import Call


def only_converts(calls: Sequence[Call], model_output: torch.Tensor, sample: torch.Tensor) -> bool:
    """Whether the scheduler is given the rows of several calls, not combined, each with the same x_t."""
    if len(calls) < 2 or len(model_output) != sum(len(call.handed_back) for call in calls):
        return False
    parts = sample.split(len(calls[0].handed_back))
    if len(parts) != len(calls) or not all(torch.equal(part, parts[0]) for part in parts):
        return False
    if any(call.handed_back.shape[1:] != model_output.shape[1:] for call in calls):
        return False
    rows = [row for call in calls for row in call.handed_back]
    return all(any(torch.equal(given, row.to(given)) for row in rows) for given in model_output)


def is_converted(given: Mapping[str, Any]) -> bool:
    """Whether what the step is given in place of a prediction is a clean estimate, which it takes as it is."""
    return given.get("pred_original_sample") is not None


def check_sample_is_left(kind: str, acting: Mapping[str, Guidance]) -> None:
    """Refuse edits of the sample where the guided step was the one of which only the clean estimate is used.

    Raises:
        UnsupportedPipelineError: naming the guidances that edit it.
    """
    editing = [name for name, guidance in acting.items() if guidance.overrides("after_step")]
    if editing:
        raise UnsupportedPipelineError(
            f"{', '.join(editing)}: {kind} without classifier-free guidance steps each prediction twice, and keeps "
            "nothing that is done to the sample after the first time. Call it with guidance_scale above 1."
        )
