"""A memory budget: rows that do not fit are computed in pieces, and the result is the same to rounding."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from configured import close
from fingerprint import of_pipeline
from hypothesis import given
from hypothesis import strategies as st
from recorder import recorded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import CASES, run

import trimtab
from trimtab.pipelines.budget import pieces

GUIDANCES: dict[str, dict[str, Any]] = {"pag": {"scale": 2.0}, "seg": {"scale": 1.5}}
BATCH = {"num_images_per_prompt": 3}


def prepared(name: str, **guidances: dict[str, Any]) -> Any:
    pipe = trimtab.guide(CASES[name].build())
    for plugin, parameters in (guidances or GUIDANCES).items():
        pipe.add_guidance(plugin, **parameters)
    return pipe


class Device(TorchDispatchMode):
    """Memory of so many bytes: what an operation puts there stays until nothing holds it any more.

    Attributes:
        most: the bytes that were held at once.
    """

    def __init__(self, size: float = math.inf) -> None:
        super().__init__()
        self.size, self.most, self._held = size, 0, 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        if self._held + size > self.size:
            raise torch.OutOfMemoryError(f"{size} bytes more do not fit beside {self._held} of {self.size}")

        def release(_: Any) -> None:
            del self._storages[key]
            self._held -= size

        self._storages[key] = weakref.ref(storage, release)
        self._held += size
        self.most = max(self.most, self._held)


# -- which rows go together ----------------------------------------------------------------------------------------
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 8))
def test_every_row_is_in_one_piece_beside_its_parent_where_both_fit(sizes: list[int], most: int) -> None:
    parents = [first for first, size in enumerate(sizes) for _ in range(size)]
    found = pieces(parents, most)
    assert sorted(row for piece in found for row in piece) == list(range(len(parents)))
    assert all(len(piece) <= most for piece in found)
    for parent, size in enumerate(sizes):
        holding = [piece for piece in found if any(parents[row] == parent for row in piece)]
        assert len(holding) == math.ceil(size / most)
    assert len(found) <= 1 or len(found[0]) + len(found[-1]) > most


# -- a limit that the user sets ------------------------------------------------------------------------------------
@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("name", ["sd15", "sd3", "qwenimage", "dit", "flux"])
def test_no_call_has_more_rows_than_allowed_and_the_result_is_the_same(name: str, most: int) -> None:
    """Down to one row a call, which is less than one branch of the batch; and as the plan says."""
    case, batch = CASES[name], {} if name == "dit" else BATCH
    expected = run(prepared(name), case, **batch)
    pipe = CASES[name].build()
    record = recorded(pipe, case.denoiser)
    trimtab.guide(pipe)
    for plugin, parameters in GUIDANCES.items():
        pipe.add_guidance(plugin, **parameters)
    pipe.guidance_max_rows = most
    plan = pipe.explain_guidance(**{**case.call, **batch})
    close(run(pipe, case, **batch), expected, 1e-5)
    assert max(forward.rows for forward in record.forwards) <= most
    assert pipe.last_guided_run.evaluations == plan.evaluations
    # Where roles are seen at the first scheduler step only, its branches are calls of their own.
    assert [len(step.forwards) for step in record.steps][1:] == [step.calls for step in plan.steps][1:]


@pytest.mark.parametrize("plugin", ["sag", "autoguidance", "perp_neg"])
def test_calls_of_their_own_are_split_as_well(plugin: str) -> None:
    """At another point, of another denoiser, and under a further prompt."""
    parameters: dict[str, Any] = {
        "sag": {},
        "autoguidance": {"weak": CASES["sd15"].build().unet},
        "perp_neg": {"negative_prompt": "a blue fox"},
    }[plugin]
    expected = run(prepared("sd15", **{plugin: parameters}), CASES["sd15"], **BATCH)
    pipe = CASES["sd15"].build()
    record = recorded(pipe, "unet")
    trimtab.guide(pipe).add_guidance(plugin, **parameters)
    pipe.guidance_max_rows = 2
    close(run(pipe, CASES["sd15"], **BATCH), expected, 1e-5)
    assert max(forward.rows for forward in record.forwards) == 2
    assert pipe.last_guided_run.forward_calls == pipe.explain_guidance(**CASES["sd15"].call, **BATCH).calls


def test_a_perturbed_row_is_computed_beside_its_parent() -> None:
    """So the blocks that they share are computed once, although the unconditional row is a call of its own."""
    pipe = CASES["sd15"].build()
    record = recorded(pipe, "unet")
    trimtab.guide(pipe).add_guidance("pag", scale=3.0)
    pipe.guidance_max_rows = 2
    run(pipe, CASES["sd15"])
    assert [[forward.rows for forward in step.forwards] for step in record.steps] == [[2, 1]] * 3
    pipe.guidance_max_rows = 3
    record.steps.clear()
    run(pipe, CASES["sd15"])
    assert [[forward.rows for forward in step.forwards] for step in record.steps] == [[3]] * 3


def test_what_does_not_split_into_rows_stays_whole() -> None:
    """Z-Image is given lists."""
    expected = run(prepared("z_image", pag={"scale": 2.0}), CASES["z_image"])
    pipe = prepared("z_image", pag={"scale": 2.0})
    pipe.guidance_max_rows = 1
    close(run(pipe, CASES["z_image"]), expected, 1e-5)


def test_the_plan_shows_the_pieces() -> None:
    pipe = prepared("sd15")
    call = {**CASES["sd15"].call, **BATCH}
    assert "rows a call" not in str(pipe.explain_guidance(**call))
    pipe.guidance_max_rows = 6
    plan = pipe.explain_guidance(**call)
    assert "at most 6 rows a call: 12 rows of a step in pieces of 6, 6" in str(plan)
    assert plan.calls == 2 * len(plan.steps)


# -- a limit that the device has -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_rows_that_do_not_fit_into_memory_are_computed_in_pieces(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """On a device for six rows a picture of twelve is the same to rounding, and twelve are tried once a run."""
    pipe = prepared(name)
    with Device() as roomy:
        expected = run(pipe, CASES[name], **BATCH)
    frame = of_pipeline(pipe, values=False)
    pipe.guidance_max_rows = 6
    with Device() as enough:
        run(pipe, CASES[name], **BATCH)
    del pipe.guidance_max_rows
    assert enough.most < roomy.most
    with caplog.at_level("WARNING", "trimtab"), Device(enough.most):
        result = run(pipe, CASES[name], **BATCH)
    close(result, expected, 1e-5)
    assert [record.message for record in caplog.records] == [
        "12 rows do not fit into memory: at most 6 a call from here on"
    ]
    assert of_pipeline(pipe, values=False) == frame


def test_one_row_that_does_not_fit_is_an_error_after_which_nothing_is_left() -> None:
    pipe = CASES["sd15"].build()
    stock, frame = run(pipe, CASES["sd15"]), of_pipeline(pipe, values=False)
    fitting = pipe.unet.mid_block.forward

    def full(*args: Any, **kwargs: Any) -> Any:
        return fitting(*args, **kwargs), torch.empty(2**60, dtype=torch.uint8)

    trimtab.guide(pipe).add_guidance("pag")
    pipe.unet.mid_block.forward = full
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        run(pipe, CASES["sd15"])
    del pipe.unet.mid_block.forward
    pipe.remove_guidance("pag")
    assert of_pipeline(pipe, values=False) == frame
    assert torch.equal(run(pipe, CASES["sd15"]), stock)


def test_the_allocator_of_the_cpu_is_understood_as_well(caplog: pytest.LogCaptureFixture) -> None:
    """It raises a RuntimeError of its own, here a real one."""
    pipe = prepared("sd15")
    expected = run(pipe, CASES["sd15"])
    fitting, rows = pipe.unet.forward, []

    def forward(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(sample))
        if len(sample) > 2:
            torch.empty(2**60, dtype=torch.uint8)
        return fitting(sample, *args, **kwargs)

    pipe.unet.forward = forward
    with caplog.at_level("WARNING", "trimtab"):
        close(run(pipe, CASES["sd15"]), expected, 1e-5)
    first = rows.index(4)
    assert rows[first : first + 3] == [4, 2, 2] and rows.count(4) == 1
    assert "4 rows do not fit into memory" in caplog.text
