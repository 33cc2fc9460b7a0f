"""Branch parallelism: the rows of one denoiser call on several processes, their predictions gathered on all of them.

All processes of a group make the same pipeline call with the same seed, as programs of `torch.distributed` do. Of each
denoiser call each computes its share of the rows; of branches that are calls of their own, every n-th. As all processes
then hold the same predictions, the scheduler's steps agree without being sent.
"""

from __future__ import annotations

import atexit
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, replace
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from ...guidance.branch import Branch
from ...guidance.errors import ParameterError
from ..budget import Budget
from ..layout import Layout, part_of
from ..perturbation import Perturber
from ..prediction import primary, with_primary
from ..rows import AmbiguousRowsError, index_of, take_rows, tensors_in
from .lockstep import Lockstep, Moment
from .shares import load, shares

Computed = TypeVar("Computed")


@dataclass
class Measured:
    """What one run took, in one process or, added up, in all of a group.

    Args:
        exchanges: of predictions.
        rows: computed for them; a row that runs through the whole denoiser is 1.
        computing: seconds in the denoiser for them.
        waiting: seconds until the slowest process was done.
        exchanging: seconds in which predictions were sent.
        row_seconds: what a row took in each process of the group; 0 where one computed none.
    """

    exchanges: float = 0.0
    rows: float = 0.0
    computing: float = 0.0
    waiting: float = 0.0
    exchanging: float = 0.0
    row_seconds: tuple[float, ...] = ()


def _end_of_program() -> None:
    """Let go of the other processes while there is an interpreter: gloo's threads, left running, abort the program."""
    if distributed.is_initialized():
        with suppress(Exception):
            distributed.destroy_process_group()


class BranchParallel:
    """A group of processes that share the branches of each step.

    Args:
        processes: in a group; by default all that there are.
        timeout: seconds after which a process that does not answer counts as gone.

    Attributes:
        size, rank: processes of the group, and this one's number in it.
        groups, index: groups there are, and this one's number; images are split over these.
        measured: of the last run, in all processes of the group.
    """

    def __init__(self, processes: int | None = None, timeout: float = 600.0) -> None:
        if not (isinstance(timeout, (int, float)) and timeout > 0):
            raise ParameterError(f"enable_branch_parallel: timeout={timeout!r}; allowed: seconds > 0.")
        if not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            PartialState(cpu=not torch.accelerator.is_available())
            atexit.register(_end_of_program)
        if not distributed.is_initialized():
            raise ParameterError(
                "enable_branch_parallel: this is the only process. Start the program with torchrun or accelerate "
                "launch, in as many processes as there are devices."
            )
        world = distributed.get_world_size()
        processes = world if processes is None else processes
        if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1 or world % processes:
            allowed = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
            raise ParameterError(
                f"enable_branch_parallel: processes={processes!r}; allowed: a divisor of the {world} processes that "
                f"there are: {allowed}."
            )
        self._lockstep = Lockstep(processes, timeout)
        self.size, self.rank = self._lockstep.size, self._lockstep.rank
        self.groups, self.index = self._lockstep.groups, self._lockstep.index
        self.measured = Measured()

    @contextmanager
    def run(self) -> Iterator[None]:
        """One run of the pipeline, which ends alike in all processes."""
        self.measured = Measured()
        with self._lockstep.run():
            yield
        if self.size > 1:
            each = self._lockstep.gather(torch.tensor(astuple(self.measured)[:-1], dtype=torch.float64))
            paces = tuple(computing / rows if rows else 0.0 for _, rows, computing, *_ in each.tolist())
            self.measured = replace(Measured(*each.sum(0).tolist()), row_seconds=paces)

    @property
    def lost(self) -> bool:
        """Whether a process of the group has ended, so that no further run is possible."""
        return self._lockstep.left

    def check(self, pipe: Any) -> None:
        """Refuse a network whose weights are gathered from this group, whose processes compute different rows of it.

        Raises:
            ParameterError: naming it.
        """
        others = set(self._lockstep.ranks) - {distributed.get_rank()}
        for name, module in pipe.components.items():
            for weight in module.parameters() if isinstance(module, nn.Module) else ():
                if isinstance(weight, DTensor) and others.intersection(weight.device_mesh.mesh.flatten().tolist()):
                    raise ParameterError(
                        f"enable_branch_parallel: {name} is sharded over the processes that share an image's branches; "
                        "allowed: one that each of them has for itself, or disable_branch_parallel()."
                    )

    def leave(self) -> None:
        """Let go of the group."""
        self._lockstep.leave()

    def call(
        self, budget: Budget, perturber: Perturber, original: Callable[..., Any], layout: Layout, args: Sequence[Any],
        kwargs: Mapping[str, Any], whole: bool = False,
    ) -> Any:  # fmt: skip
        """`budget.call`, of which this process computes its share; the output has all rows.

        Args:
            whole: whether every process needs what happens inside for all rows, and so computes them itself.

        Raises:
            AmbiguousRowsError, RuntimeError, torch.OutOfMemoryError: in all processes, where one could not do it.
            GuidanceRuntimeError: see `Lockstep.agree`.
        """
        if layout.total == 1 or self.size == 1:
            return budget.call(perturber, original, layout, args, kwargs)
        if whole:
            compute_all = functools.partial(budget.call, perturber, original, layout, args, kwargs)
            return self._agreed(Moment.WHOLE_CALL, compute_all, (args, kwargs), budget)
        blocks = len(perturber.family.blocks)
        rows = shares(layout, self.size, blocks)
        # One beyond the last row computes that again, so as to know what a prediction looks like.
        mine = rows[self.rank] or [layout.total - 1]
        output: Any = None

        def compute() -> torch.Tensor:
            nonlocal output
            own_args, own_kwargs = take_rows((tuple(args), dict(kwargs)), layout.total, index_of(mine))
            output = budget.call(perturber, original, part_of(layout, mine), own_args, own_kwargs)
            prediction = primary(output)
            if sum(tensor.numel() for tensor in tensors_in(output)) != prediction.numel():
                raise AmbiguousRowsError("the denoiser returns more than a prediction")
            if prediction.shape[0] != len(mine):
                raise AmbiguousRowsError(f"the denoiser returned {prediction.shape[0]} rows for {len(mine)}")
            return prediction

        every = self._together(Moment.SHARED_CALL, compute, rows, (args, kwargs), budget)
        self.measured.rows += load(layout, rows[self.rank], blocks)
        return with_primary(output, every)

    def each(
        self, branches: Sequence[Branch], compute: Callable[[Branch], torch.Tensor], like: torch.Tensor, given: Any,
        budget: Budget,
    ) -> dict[Branch, torch.Tensor]:  # fmt: skip
        """Branches that are calls of their own, every n-th computed by each process.

        Args:
            compute: makes the prediction of one.
            like: another prediction of the same step `[batch, ...]`.
            given: what they are made from, which must be alike in all processes.
            budget: under which they are made.
        """
        if len(branches) < 2 or self.size == 1:
            return {branch: compute(branch) for branch in branches}
        batch = like.shape[0]
        numbers = [range(process, len(branches), self.size) for process in range(self.size)]
        rows = [[number * batch + image for number in own for image in range(batch)] for own in numbers]

        def computed() -> torch.Tensor:
            return torch.cat([like[:0], *(compute(branches[number]).to(like) for number in numbers[self.rank])])

        every = self._together(Moment.SEPARATE_CALLS, computed, rows, given, budget)
        self.measured.rows += len(rows[self.rank])
        return dict(zip(branches, every.split(batch), strict=True))

    def _agreed(self, moment: Moment, compute: Callable[[], Computed], given: Any, budget: Budget) -> Computed:
        """What `compute` makes, once all processes have made theirs."""
        failure: Exception | None = None
        try:
            computed = compute()
        except Exception as error:
            failure = error
        self._lockstep.agree(moment, given, failure, budget)
        return computed

    def _together(
        self, moment: Moment, compute: Callable[[], torch.Tensor], rows: Sequence[Sequence[int]], given: Any,
        budget: Budget,
    ) -> torch.Tensor:  # fmt: skip
        """All rows, of which `compute` makes this process's own."""
        most = max(map(len, rows))
        began = computed = time.perf_counter()

        def padded() -> torch.Tensor:
            nonlocal computed
            try:
                prediction = compute()
                own = prediction[: len(rows[self._lockstep.rank])]
                made = prediction.new_zeros(most, *prediction.shape[1:])
                made[: len(own)] = own
                _finish(made.device)
            finally:
                computed = time.perf_counter()
            return made

        own = self._agreed(moment, padded, given, budget)
        agreed = time.perf_counter()
        parts = self._lockstep.gather(own)
        order = torch.tensor([row for held in rows for row in held]).argsort()
        found = torch.cat([part[: len(held)] for part, held in zip(parts, rows, strict=True)])[order.to(parts.device)]
        _finish(found.device)
        self.measured.exchanges += 1
        if rows[self._lockstep.rank]:
            self.measured.computing += computed - began
        self.measured.waiting += agreed - computed
        self.measured.exchanging += time.perf_counter() - agreed
        return found


def _finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
