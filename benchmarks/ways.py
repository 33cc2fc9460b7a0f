"""What ways to the same end cost: they take turns, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm.auto import tqdm


@dataclass
class Way:
    """One way to sample, and what was measured of it: `peak` is bytes allocated at once beside the weights."""

    name: str
    run: Callable[[], Any] = field(repr=False)
    seconds: list[float] = field(default_factory=list)
    flops: int = 0
    peak: int = 0


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""What torch's counter leaves out; a function of shapes."""


def measure(ways: Sequence[Way], repeats: int, device: str) -> None:
    """Fill in what the ways cost; each first runs once, which counts its FLOPs and memory and warms it up."""
    with tqdm(total=len(ways) * (repeats + 1), desc="speed") as bar:
        for way in ways:
            gc.collect()
            with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
                way.peak = allocated(way.run, device)
            way.flops = counter.get_total_flops()
            bar.update()
        for _ in range(repeats):
            for way in ways:
                gc.collect()
                started = time.perf_counter()
                way.run()
                if device != "cpu":
                    torch.cuda.synchronize()
                way.seconds.append(time.perf_counter() - started)
                bar.update()


def allocated(run: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes that a call holds at once beside what was there before, as torch's allocator sees it."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return int(torch.cuda.max_memory_allocated()) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))
