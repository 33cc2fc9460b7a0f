"""`trimtab ... --processes N`: the same command in several processes of this machine.

PyTorch's elastic launcher does it, which `accelerate launch` calls on GPUs too; on CPUs the latter would want MPI.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..once import RUN, notes

LAUNCHER = "TRIMTAB_LAUNCHER"
"""The process, by number, without which those that it started end too."""


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def started() -> bool:
    """Whether a launcher started this process, if only this one: it must not launch again."""
    return launched() or RUN in os.environ


def first() -> bool:
    """Whether this process is the one that speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def end_with_launcher() -> None:
    """End this process once the one that launched it is gone, which nobody tells it if that one was killed."""
    launcher = os.environ.pop(LAUNCHER, None)  # not meant for what this one starts
    if launcher is None and launched() and RUN in os.environ:  # by Accelerate or torchrun
        launcher = str(os.getppid())
    if launcher is not None:
        threading.Thread(target=_end_without, args=(int(launcher),), daemon=True).start()


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `trimtab` with these arguments in `processes` processes, each with its share of the cores; the exit code.

    When one ends with an error, or this one ends, the others are ended too; what it said stands on stderr.
    """
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-m", "trimtab", *arguments)
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        print(f"trimtab: error: ended by {name}; the same command continues.", file=sys.stderr)
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"trimtab: error: process {rank} was ended by {name}; the same command continues.", file=sys.stderr)
        return max(1, failure.exitcode)
    finally:
        del os.environ[LAUNCHER]
        shutil.rmtree(notes(config.run_id, os.getpid()), ignore_errors=True)
    return 0
