"""A compiled denoiser: guidance acts in it, one graph more a plan, and with nothing attached it is stock again."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from guided_runs import close
from zoo import CASES, run

import trimtab

WAYS: dict[str, Callable[..., None]] = {
    "module.compile": lambda pipe, name, **options: getattr(pipe, name).compile(**options),
    "torch.compile": lambda pipe, name, **options: setattr(pipe, name, torch.compile(getattr(pipe, name), **options)),
}
WHOLE = {"start": 0.0, "stop": 1.0}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.made += 1
        return graph.forward


def counted(pipe: Any, name: str, graphs: Graphs) -> tuple[torch.Tensor, list[int]]:
    """The output, and how many graphs each step made."""
    made = [graphs.made]

    def note(pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        made.append(graphs.made)
        return {}

    output = run(pipe, CASES[name], callback_on_step_end=note)
    return output, [after - before for before, after in itertools.pairwise(made)]


@pytest.mark.parametrize(
    ("name", "plugin", "way"),
    [
        ("sd15", "pag", "module.compile"), ("sd15", "slg", "torch.compile"), ("flux", "pag", "torch.compile"),
        ("flux", "slg", "module.compile"), ("sd3", "pag", "module.compile"),
    ],
)  # fmt: skip
def test_guidance_acts_in_one_more_graph_that_the_first_step_makes(name: str, plugin: str, way: str) -> None:
    pipe: Any = trimtab.guide(CASES[name].build())
    parameters = {"scale": 3.0, **(WHOLE if plugin == "slg" else {})}
    stock = run(pipe, CASES[name])
    with pipe.guidance(plugin, **parameters):
        eager = run(pipe, CASES[name])
    assert (eager - stock).abs().max() > 1e-3 * stock.abs().max()

    graphs = Graphs()
    WAYS[way](pipe, CASES[name].denoiser, backend=graphs, fullgraph=True)
    output, made = counted(pipe, name, graphs)
    assert torch.equal(output, stock) and made == [1, 0, 0]
    for expected in ([1, 0, 0], [0, 0, 0]):
        with pipe.guidance(plugin, **parameters):
            output, made = counted(pipe, name, graphs)
        assert torch.equal(output, eager) and made == expected
    output, made = counted(pipe, name, graphs)
    assert torch.equal(output, stock) and made == [0, 0, 0]


@pytest.mark.parametrize(("name", "fullgraph"), [("sd15", True), ("sd15", False), ("flux", True)])
def test_blocks_that_are_compiled_one_by_one_share_graphs(name: str, fullgraph: bool) -> None:
    pipe: Any = trimtab.guide(CASES[name].build())
    stock = run(pipe, CASES[name])
    with pipe.guidance("pag", scale=3.0):
        eager = run(pipe, CASES[name])
    graphs = Graphs()
    getattr(pipe, CASES[name].denoiser).compile_repeated_blocks(backend=graphs, fullgraph=fullgraph)
    run(pipe, CASES[name])
    for _ in range(2):
        with pipe.guidance("pag", scale=3.0):
            output, made = counted(pipe, name, graphs)
        # Sizes become symbols, by which an attention may be computed in another order.
        close(output, eager)
        assert not any(made[1:])
    assert made == [0, 0, 0]
    assert graphs.made <= torch._dynamo.config.recompile_limit  # beyond which blocks are no longer compiled
    assert torch.equal(counted(pipe, name, graphs)[0], stock)


@pytest.mark.parametrize("limit", [1, 16])
def test_beyond_torchs_limit_blocks_run_uncompiled_and_guidance_acts_all_the_same(
    limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch says so, and names what to set."""
    pipe: Any = trimtab.guide(CASES["sd15"].build())
    pipe.add_guidance("pag", scale=3.0)
    eager, graphs = run(pipe, CASES["sd15"]), Graphs()
    pipe.unet.compile_repeated_blocks(backend=graphs)
    torchs = logging.getLogger("torch._dynamo.convert_frame")
    torchs.addHandler(caplog.handler)
    with torch._dynamo.config.patch(recompile_limit=limit):
        output, made = counted(pipe, "sd15", graphs)
    torchs.removeHandler(caplog.handler)
    close(output, eager)
    assert made[0] and not any(made[1:])
    assert ("hit config.recompile_limit (1)" in caplog.text) == (limit == 1)


@pytest.mark.parametrize(
    ("name", "plans"),
    [
        ("sd15", [("seg", {"sigma": 0.5}), ("seg", {"sigma": 1.0}), ("seg", {"sigma": 0.5})]),
        ("flux", [("pag", {}), ("seg", {}), ("pag", {})]),
    ],
)
def test_another_perturbation_is_another_graph(name: str, plans: list[tuple[str, dict[str, Any]]]) -> None:
    """The kind that acts, or a number in it, is not what happened to be traced first; what was before is there."""
    pipe: Any = trimtab.guide(CASES[name].build())
    eager = []
    for plugin, parameters in plans:
        with pipe.guidance(plugin, scale=3.0, **parameters):
            eager.append(run(pipe, CASES[name]))
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(eager))
    graphs = Graphs()
    getattr(pipe, CASES[name].denoiser).compile(backend=graphs, fullgraph=True)
    for (plugin, parameters), expected in zip(plans, eager, strict=True):
        with pipe.guidance(plugin, scale=3.0, **parameters):
            output, made = counted(pipe, name, graphs)
        close(output, expected, 1e-6)
        assert made[0] <= 1 and not any(made[1:])
    assert graphs.made == 2


def test_what_no_thread_has_perturbed_before_is_one_graph_as_well() -> None:
    pipe: Any = trimtab.guide(CASES["sd15"].build())
    graphs = Graphs()
    pipe.unet.compile(backend=graphs, fullgraph=True)
    pipe.add_guidance("pag", scale=3.0)
    with ThreadPoolExecutor(1) as another:
        _, made = another.submit(counted, pipe, "sd15", graphs).result()
    assert made == [1, 0, 0]


def test_another_strength_is_no_other_graph() -> None:
    pipe: Any = trimtab.guide(CASES["sd15"].build())
    graphs = Graphs()
    pipe.unet.compile(backend=graphs, fullgraph=True)
    outputs = []
    for scale in (1.0, 2.0):
        with pipe.guidance("pag", scale=scale):
            outputs.append(run(pipe, CASES["sd15"]))
    assert graphs.made == 1
    assert not torch.equal(*outputs)


def test_maps_that_are_watched_come_out_of_the_graph() -> None:
    """SAG reads the attention of the step before it makes its own call: two plans."""
    pipe: Any = trimtab.guide(CASES["sd15"].build())
    with pipe.guidance("sag", scale=0.5):
        eager = run(pipe, CASES["sd15"])
    graphs = Graphs()
    pipe.unet.compile(backend=graphs, fullgraph=True)
    with pipe.guidance("sag", scale=0.5):
        output, made = counted(pipe, "sd15", graphs)
    assert torch.equal(output, eager)
    assert made == [2, 0, 0]


def test_layers_inside_one_another_act_in_one_graph() -> None:
    """A block is left out for some rows, an attention in it perturbed for others."""
    pipe: Any = trimtab.guide(CASES["sd3"].build())
    pipe.add_guidance("pag", scale=3.0, layers="blocks.1")
    pipe.add_guidance("slg", scale=2.0, layers="blocks.1", **WHOLE)
    eager = run(pipe, CASES["sd3"])
    graphs = Graphs()
    pipe.transformer.compile(backend=graphs, fullgraph=True)
    output, made = counted(pipe, "sd3", graphs)
    assert torch.equal(output, eager)
    assert made == [1, 0, 0]
