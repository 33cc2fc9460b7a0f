"""Processes in lockstep: they make the same call, exchange what each computed, and come to one outcome.

Before predictions are exchanged each process says what it is about to do, on what, and whether it could. All decide by
the same table, so that all go on alike or all end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from enum import IntEnum
from typing import Any, NoReturn

import torch
from torch import distributed

from ...guidance.errors import GuidanceRuntimeError, TrimtabError
from ..budget import Budget, is_out_of_memory
from ..rows import AmbiguousRowsError, tensors_in

SAMPLES = 7
"""Values of each tensor that are compared between processes, beside their size and how many there are."""
ALIKE = 0.05
"""How far these may be apart, in units of a tensor's own size; other kinds of devices round otherwise."""
MESSAGE_BYTES = 512


class Moment(IntEnum):
    """What the processes are about to do together."""

    SHARED_CALL = 1
    WHOLE_CALL = 2
    SEPARATE_CALLS = 3
    END_OF_RUN = 4


class State(IntEnum):
    """How it went in one process; the highest of all processes counts for all."""

    COMPUTED = 0
    NOT_IN_ROWS = 1
    REFUSED_ROWS = 2
    OUT_OF_MEMORY = 3
    FAILED = 4


class Lockstep:
    """One group of neighbouring processes out of all that `torch.distributed` knows.

    Args:
        processes: in a group; divides the number of all.
        timeout: seconds after which a process that does not answer counts as gone.

    Attributes:
        size, rank: processes of the group, and this one's number in it.
        ranks: their numbers among all processes.
        groups, index: groups there are, and this one's number.
    """

    def __init__(self, processes: int, timeout: float) -> None:
        world, own = distributed.get_world_size(), distributed.get_rank()
        self.size, self.rank = processes, own % processes
        self.groups, self.index = world // processes, own // processes
        self.ranks = tuple(range(self.index * processes, (self.index + 1) * processes))
        self._timeout = timeout
        limit = timedelta(seconds=timeout)
        # A process that dies is noticed at once by gloo, whatever carries the predictions.
        self._words, _ = distributed.new_subgroups(processes, timeout=limit, backend="gloo")
        same = distributed.get_backend() == "gloo"
        self._tensors = self._words if same else distributed.new_subgroups(processes, timeout=limit)[0]
        self._settled = False

    @contextmanager
    def run(self) -> Iterator[None]:
        """One run, which ends alike in all processes: an error in one of them is an error in all."""
        if self.left:
            self._gone("has ended, or did not answer in time, in an earlier run")
        self._settled = False
        try:
            yield
        except Exception as error:
            if not self._settled:
                with suppress(Exception):
                    self.agree(Moment.END_OF_RUN, failure=error)
            raise
        except BaseException:
            self.leave()  # who is interrupted waits for nobody, and lets nobody wait
            raise
        self.agree(Moment.END_OF_RUN)

    def agree(
        self, moment: Moment, given: Any = (), failure: Exception | None = None, budget: Budget | None = None
    ) -> None:
        """Wait for all processes, and raise the same kind of error in all where one of them could not go on.

        Args:
            moment: what comes next.
            given: tensors that must be alike in all processes.
            failure: what happened in this one.
            budget: becomes the tightest of all processes, which then split their calls alike.

        Raises:
            AmbiguousRowsError, RuntimeError, torch.OutOfMemoryError: the rows could not be computed together.
            GuidanceRuntimeError: a process failed, is gone, or makes another image.
        """
        state = _state(moment, failure)
        budget = Budget() if budget is None else budget
        limits = budget.to_numbers()
        words = torch.tensor([state, *limits, moment, *_fingerprint(given)], dtype=torch.float64)
        said, held, alike = self._all(words, self._words).tensor_split((1, 1 + len(limits)), dim=1)
        budget.tighten(*held.amin(0).tolist())
        states = [State(int(row)) for row in said]
        worst = max(states)
        if worst is State.FAILED:
            self._end(states, failure)
        if bool(((alike - alike[:1]).abs() > ALIKE).any()):
            self._settled = True
            raise GuidanceRuntimeError(
                f"branch parallel: processes {self._named()} do not make the same image. Give each of them the same "
                "arguments, guidances and seed (generator=torch.Generator().manual_seed(0)); images are split over "
                "groups: pipe.enable_branch_parallel(processes=...)."
            )
        where = f"in process {self.ranks[states.index(worst)]}"
        if worst is State.NOT_IN_ROWS:
            raise AmbiguousRowsError(f"{failure or where}") from failure
        if worst is State.REFUSED_ROWS:
            raise RuntimeError(f"{failure or where}") from failure
        if worst is State.OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"out of memory {where}") from failure

    @property
    def left(self) -> bool:
        """Whether this process has let go of the group."""
        return self._words is None

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """`value` of every process, `[processes, ...]`."""
        # What carries predictions between GPUs carries nothing else.
        return self._all(value, self._words if value.device.type == "cpu" else self._tensors)

    def leave(self) -> None:
        """Let go of the group; processes that wait for this one then notice."""
        groups, self._words, self._tensors = {self._words, self._tensors}, None, None
        for group in groups - {None}:
            with suppress(Exception):
                distributed.destroy_process_group(group)

    def _all(self, value: torch.Tensor, group: Any) -> torch.Tensor:
        through = torch.device("cpu") if distributed.get_backend(group) == "gloo" else value.device
        sent = value.detach().to(through).contiguous()
        received = [torch.empty_like(sent) for _ in range(self.size)]
        try:
            distributed.all_gather(received, sent, group=group)
        except RuntimeError as error:
            self._settled = True
            self.leave()
            late = "timed out" in str(error).lower()
            self._gone(f"did not answer for {self._timeout:g} s" if late else "has ended", error)
        return torch.stack(received).to(value.device)

    def _end(self, states: list[State], failure: Exception | None) -> NoReturn:
        """Raise in all processes, as one of them failed; the others tell what it said."""
        self._settled = True
        said = f"{type(failure).__name__}: {failure}".encode()[:MESSAGE_BYTES] if failure is not None else b""
        texts = self._all(torch.tensor(list(said.ljust(MESSAGE_BYTES)), dtype=torch.uint8), self._words)
        if failure is not None and states[self.rank] is State.FAILED:
            raise failure
        first = states.index(State.FAILED)
        text = bytes(texts[first].tolist()).decode(errors="ignore").strip()
        raise GuidanceRuntimeError(
            f"branch parallel: process {self.ranks[first]} failed, which ends processes {self._named()}: {text}"
        )

    def _gone(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise GuidanceRuntimeError(
            f"branch parallel: one of the processes {self._named()} {what}; its own output says why. Start all of them "
            "again, or go on alone: pipe.disable_branch_parallel()."
        ) from cause

    def _named(self) -> str:
        return ", ".join(map(str, self.ranks))


def _state(moment: Moment, failure: Exception | None) -> State:
    """Rows that cannot be computed together are computed otherwise; every other failure is the end."""
    if failure is None:
        return State.COMPUTED
    if moment not in (Moment.SHARED_CALL, Moment.WHOLE_CALL):
        return State.FAILED
    if isinstance(failure, AmbiguousRowsError):
        return State.NOT_IN_ROWS
    if is_out_of_memory(failure):
        return State.OUT_OF_MEMORY
    refused = isinstance(failure, (IndexError, RuntimeError, TypeError, ValueError))
    return State.REFUSED_ROWS if refused and not isinstance(failure, TrimtabError) else State.FAILED


def _fingerprint(given: Any) -> list[float]:
    """A few numbers that differ where the tensors do, each tensor in units of its own size."""
    total, count = torch.zeros(SAMPLES + 1, dtype=torch.float64), 0
    for tensor in tensors_in(given):
        if tensor.numel():
            flat = tensor.detach().flatten()
            # In whole numbers: a float32 cannot tell the last of 20 million elements from the one after it.
            places = torch.arange(SAMPLES, device=flat.device) * (flat.numel() - 1) // (SAMPLES - 1)
            size = flat.float().square().mean().sqrt().reshape(1)
            total += torch.cat([flat[places].float() / (size + 1e-12), size.log1p()]).cpu().double()
            count += flat.numel()
    return [*total.nan_to_num(0.0, 0.0, 0.0).tolist(), float(count)]
