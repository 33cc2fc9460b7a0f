"""Work that several processes share: each does its part, and all of them know all results."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..pipelines.launch import launched

Result = TypeVar("Result")


def shared(compute: Callable[[int], Result], count: int, what: str) -> list[Result]:
    """`[compute(0), ..., compute(count - 1)]`, of which process p of P computes p, p + P, p + 2 P, ...

    So a result does not depend on the number of processes, as long as each computes with as many threads.

    Args:
        compute: what is to be done; its results travel between processes.
        count: how often.
        what: for the progress bar, which the first process shows.
    """
    state = PartialState(cpu=True) if launched() else None
    first, step = (0, 1) if state is None else (state.process_index, state.num_processes)
    mine = [compute(index) for index in tqdm(range(first, count, step), desc=what, leave=False, disable=first > 0)]
    if state is None:
        return mine
    parts: list[list[Result]] = gather_object([mine])
    return [parts[index % step][index // step] for index in range(count)]
