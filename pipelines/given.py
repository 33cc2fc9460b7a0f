"""What a hook is given is for reading: a change in place, or a prediction that was not asked for, is an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from ..guidance.branch import Branch
from ..guidance.errors import GuidanceRuntimeError


@contextmanager
def only_read(name: str, hook: str, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Refuse that the hook changes one of these tensors within the block, or looks up an undeclared branch.

    Args:
        name: of the guidance.
        hook: that is called.
        tensors: what it is given; those of inference mode, which count no changes, are not watched.

    Raises:
        GuidanceRuntimeError: naming both, and what to do.
    """
    given = [tensor for tensor in tensors if not tensor.is_inference()]
    before = [tensor._version for tensor in given]
    try:
        yield
    except KeyError as error:
        if error.args and isinstance(error.args[0], Branch):
            raise GuidanceRuntimeError(
                f"{name}: {hook} reads the prediction of {error.args[0]}, which was not asked for; return that branch "
                "from branches(step) as well."
            ) from error
        raise
    if any(tensor._version != version for tensor, version in zip(given, before, strict=True)):
        raise GuidanceRuntimeError(
            f"{name}: {hook} changed in place what it was given, which others see too; return a new tensor, such as "
            "x.clamp(-1, 1) in place of x.clamp_(-1, 1)."
        )
