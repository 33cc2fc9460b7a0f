"""What is wrong with a plug-in fails the check that is about it, with a message that says what to change."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

import trimtab
from trimtab import COND, UNCOND, Branch, Guidance, Predictions, Run, Step, parameter
from trimtab.conformance import Example, Stage
from trimtab.conformance.subject import percent
from trimtab.conformance.tiny import assemble, sd15
from trimtab.guidance import registry

from .kit import run_kit

Report = dict[str, str]
"""The message of each failed check, by the check's name."""


@pytest.fixture
def check(tmp_path: Path) -> Iterator[Callable[..., Report]]:
    """Run the kit on a class in this process: `check(cls, example, "-k", "undo")`."""
    registered: set[str] = set()

    def run(cls: type[Guidance], example: Callable[[Any], Example] | None = None, *options: str) -> Report:
        class Author:
            @staticmethod
            def pytest_trimtab_example(name: str, pipe: Any) -> Example | None:
                return example(pipe) if example else None

        trimtab.register(cls, override=True)
        registered.add(cls.name)
        result = run_kit(tmp_path, "--trimtab-plugin", cls.name, "-q", *options, plugins=(Author(),))
        failed = {
            re.sub(r".*::test_|\[.*", "", report.nodeid): str(report.longrepr)
            for report in result.reports
            if report.failed
        }
        assert (result.code == 0) == (not failed), result.text
        return failed

    yield run
    for name in registered:
        registry.unregister(name)


@dataclass
class Away(Guidance):
    """A sound guidance, from which the wrong ones below are derived: CFG without its slot."""

    name: ClassVar[str] = "test.away"

    scale: float = parameter(2.0, "Strength s; 0 switches it off.", ge=0, le=5, off=0.0)

    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND, UNCOND) if self.scale else ()

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        return self.scale * (predictions[COND] - predictions[UNCOND]) if self.scale else None


def test_a_sound_plug_in_passes(check: Callable[..., Report]) -> None:
    assert check(Away) == {}


# -- the three promises that are broken most easily --------------------------------------------------------------------
@dataclass
class Leaking(Away):
    """Hooks into the denoiser and forgets to let go."""

    name: ClassVar[str] = "test.leaking"

    denoiser: nn.Module | None = parameter(None, "The model that it listens to.")

    def setup(self, run: Run) -> None:
        if self.denoiser is not None and not run.dry:
            self.denoiser.register_forward_hook(lambda module, args, output: None)


def test_a_leaked_hook_fails_the_undo(check: Callable[..., Report]) -> None:
    def example(pipe: Any) -> Example:
        return Example({"denoiser": pipe.components.get("unet") or pipe.components["transformer"]})

    failed = check(Leaking, example)
    assert set(failed) == {"it_undoes_what_it_did", "it_undoes_what_it_did_when_a_run_fails"}
    for message in failed.values():
        assert re.search(r"test\.leaking on [\w-]+ fails clean undo: after a run", message)
        assert re.search(r"pipe\.(unet|transformer)\._forward_hooks\[\d+\] was added", message)
        assert "run.exit_stack.callback(handle.remove)" in message


@dataclass
class Hoarding(Away):
    """Remembers its runs on itself."""

    name: ClassVar[str] = "test.hoarding"

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        self.__dict__.setdefault("seen", []).append(predictions[COND])
        return super().delta(step, predictions)


def test_what_is_kept_on_the_plug_in_fails_the_undo(check: Callable[..., Report]) -> None:
    failed = check(Hoarding, None, "-k", "undoes")
    assert set(failed) == {"it_undoes_what_it_did", "it_undoes_what_it_did_when_a_run_fails"}
    for message in failed.values():
        assert "test.hoarding.seen was added" in message and "Keep what you compute in run.state" in message


@dataclass
class Saving(Guidance):
    """Saves what its gradient needs as it is, so that a node's output keeps the node."""

    name: ClassVar[str] = "test.saving"

    scale: float = parameter(1.0, "Strength.", ge=0, off=0.0)

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            return self.scale * x0.flatten(1).logsumexp(1)


def test_a_graph_that_outlives_its_run_is_found(check: Callable[..., Report]) -> None:
    failed = check(Saving, None, "-k", "tensors or undoes")
    assert set(failed) == {"it_leaves_no_tensors"}
    assert re.search(r"a run left \d+ tensors alive", failed["it_leaves_no_tensors"])
    assert "return tensor.detach()" in failed["it_leaves_no_tensors"]


FIRST: dict[str, torch.Tensor] = {}


@dataclass
class Remembering(Away):
    """Takes the first run's prediction for that of every run."""

    name: ClassVar[str] = "test.remembering"

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        super().delta(step, predictions)
        return FIRST.setdefault(str(predictions[COND].shape), predictions[COND])


def test_what_a_module_remembers_of_the_first_run_is_found(check: Callable[..., Report]) -> None:
    failed = check(Remembering, None, "-k", "remembers or undoes or deterministic")
    FIRST.clear()
    assert set(failed) == {"it_remembers_no_run"}, "all later runs are alike"
    assert re.search(r"test_kit\.FIRST.* was added", failed["it_remembers_no_run"])
    assert "Keep what you compute in run.state" in failed["it_remembers_no_run"]
    reason = Example(exempt={"memory": "a table that no run changes"})
    assert check(Remembering, lambda pipe: reason, "-k", "remembers") == {}
    FIRST.clear()


@dataclass
class Patching(Away):
    """Changes a class, which no object shows."""

    name: ClassVar[str] = "test.patching"

    def setup(self, run: Run) -> None:
        kind: Any = type(run.pipeline.scheduler)
        if not run.dry:
            kind.step = _wrapped(kind.step)


def _wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def test_a_patched_class_fails_the_undo(check: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler):
        monkeypatch.setattr(kind, "step", kind.step)  # put back afterwards
    failed = check(Patching, None, "-k", "undoes")
    assert failed
    for message in failed.values():
        assert re.search(r"Scheduler\.step, of the class was changed", message)


@dataclass
class Reseeding(Away):
    """Makes itself deterministic at the cost of everybody else's random numbers."""

    name: ClassVar[str] = "test.reseeding"

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        torch.manual_seed(7)
        return super().delta(step, predictions)


def test_a_seeded_global_generator_fails_determinism(check: Callable[..., Report]) -> None:
    (message,) = check(Reseeding, None, "-k", "deterministic").values()
    assert "draws from a global random generator, or seeds one" in message


@dataclass
class Paying(Away):
    """Asks for its branches also where it is off."""

    name: ClassVar[str] = "test.paying"

    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND, UNCOND)


def test_branches_at_scale_0_fail_the_identity(check: Callable[..., Report]) -> None:
    (message,) = check(Paying, None, "-k", "off_it_is").values()
    assert re.search(r"where it is off it costs \d+ evaluations an image", message)
    assert "Return no branches at the value that switches it off" in message


@dataclass
class Overwriting(Away):
    """Computes in the tensors that it is given."""

    name: ClassVar[str] = "test.overwriting"

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        return predictions[COND].sub_(predictions[UNCOND]).mul_(self.scale) if self.scale else None


def test_a_change_in_place_is_an_error_that_names_the_hook(check: Callable[..., Report]) -> None:
    failed = check(Overwriting, None, "-k", "acts")
    assert "test.overwriting: delta changed in place what it was given" in failed["it_acts"]


@dataclass
class Lying(Away):
    """Asks for more in a run than in a plan."""

    name: ClassVar[str] = "test.lying"

    def setup(self, run: Run) -> None:
        run.state.dry = run.dry

    def branches(self, step: Step) -> Sequence[Branch]:
        return () if step.state.dry else super().branches(step)


def test_a_lie_about_the_cost_fails_the_evaluations(check: Callable[..., Report]) -> None:
    failed = check(Lying)
    assert "declared_evaluations_are_those_computed" in failed
    assert set(failed) <= {
        "declared_evaluations_are_those_computed", "its_whole_declared_range_works", "it_composes_with_cfg"
    }  # fmt: skip
    assert all("fails declared evaluations = actual evaluations" in message for message in failed.values())
    message = failed["declared_evaluations_are_those_computed"]
    assert "explain_guidance declares 2 an image, but the denoiser computed 4." in message
    assert "branches(step) must ask for the same predictions in a plan" in message


@dataclass
class Rolling(Away):
    """Draws from the global generator."""

    name: ClassVar[str] = "test.rolling"

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        return self.scale * torch.randn_like(predictions[COND]) if self.scale else None


def test_a_global_generator_fails_the_determinism(check: Callable[..., Report]) -> None:
    failed = check(Rolling, None, "-k", "determin or range or undo or evaluations or identity")
    assert set(failed) == {"it_is_deterministic", "its_whole_declared_range_works"}
    for message in failed.values():
        assert "fails determinism" in message and "a generator of your own" in message.lower()
    assert "run.state.generator = torch.Generator()" in failed["it_is_deterministic"]


# -- and others --------------------------------------------------------------------------------------------------------
def wrong(**hooks: Any) -> type[Guidance]:
    """`Away` with some hooks replaced."""
    return dataclass(type("Wrong", (Away,), {"name": "test.wrong", **hooks}))


def half_of_the_batch(self: Away, step: Step, predictions: Predictions) -> torch.Tensor:
    return self.scale * (predictions[COND] - predictions[COND].mean(dim=0, keepdim=True) + predictions[UNCOND])


def never_off(self: Away, step: Step, predictions: Predictions) -> torch.Tensor:
    return 0.1 * predictions[COND]


def of_the_raw_number(self: Away, step: Step, predictions: Predictions) -> torch.Tensor:
    return self.scale * predictions[COND].square()


def of_all_before(self: Away, step: Step, x0: torch.Tensor) -> torch.Tensor:
    return x0 / 0.0 if self.scale > 4 else x0


WRONG: Mapping[str, tuple[dict[str, Any], str]] = {
    "an_image_does_not_depend_on_its_batch": ({"delta": half_of_the_batch}, "not over the batch"),
    "off_it_is_the_identity": ({"delta": never_off}, r"at scale=0\.0 the image differs from the stock one by \d"),
    "all_parametrisations_lead_to_one_image": ({"delta": of_the_raw_number}, r"epsilon/v/flow agreement.*guide_x0"),
    "it_acts": ({"delta": lambda self, step, predictions: None}, r"it changed no image.*pytest_trimtab_example"),
    "its_whole_declared_range_works": ({"guide_x0": of_all_before}, r"at \{'scale'.* it raises: .*finite.*ge= and le="),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_fails_the_check_that_is_about_it(name: str, check: Callable[..., Report]) -> None:
    hooks, message = WRONG[name]
    failed = check(wrong(**hooks), None, "-k", name)
    assert set(failed) == {name}
    assert re.search(message, failed[name], re.DOTALL)


# -- plug-ins that need something --------------------------------------------------------------------------------------
@dataclass
class Needy(Away):
    """Does nothing without a parameter that only its author can give."""

    name: ClassVar[str] = "test.needy"

    words: tuple[str, ...] = parameter((), "What to look for.")

    def validate(self) -> None:
        super().validate()
        if not self.words:
            raise trimtab.ParameterError("test.needy: words=() is empty; allowed: at least one.")


def test_parameters_come_from_the_author(check: Callable[..., Report]) -> None:
    failed = check(Needy)
    assert set(failed) == {"it_acts"}
    assert "words=() is empty" in failed["it_acts"]
    assert "def pytest_trimtab_example(name, pipe):" in failed["it_acts"]
    assert check(Needy, lambda pipe: Example({"words": ("fox",)}), "-k", "determin or range or recipe") == {}


@dataclass
class Choosy(Away):
    """Refuses what has no text, and says so."""

    name: ClassVar[str] = "test.choosy"

    def branches(self, step: Step) -> Sequence[Branch]:
        return (COND, Branch(trimtab.Prompt("blurry"))) if self.scale else ()

    def delta(self, step: Step, predictions: Predictions) -> torch.Tensor | None:
        return self.scale * (predictions[COND] - predictions[self.branches(step)[1]]) if self.scale else None


def test_a_clear_refusal_is_no_failure(check: Callable[..., Report]) -> None:
    assert check(Choosy, None, "-k", "acts or determin or one_image") == {}


def test_a_plug_in_may_bring_its_own_pipeline(tmp_path: Path) -> None:
    class Author:
        @staticmethod
        def pytest_trimtab_stages(name: str) -> list[Stage]:
            return [Stage("mine", lambda: assemble(sd15), {"prompt": "a fox", "num_inference_steps": 2})]

    result = run_kit(tmp_path, "--trimtab-plugin", "pag", "-k", "determin", plugins=(Author(),))
    (report,) = result.reports
    assert report.passed and report.nodeid.endswith("::test_it_is_deterministic[pag-mine]")


def test_refusing_everything_is(check: Callable[..., Report]) -> None:
    def refuse(self: Away, run: Run) -> None:
        raise trimtab.UnsupportedPipelineError("test.wrong takes videos only.")

    failed = check(wrong(setup=refuse), None, "-k", "acts")
    assert "on none of 3 pipelines did it do anything" in failed["it_acts"]
    assert "takes videos only" in failed["it_acts"]


def test_an_exemption_is_shown_with_its_reason(check: Callable[..., Report]) -> None:
    reason = "its formula is one of raw predictions"
    example = Example(exempt={"agreement": reason})
    assert check(wrong(delta=of_the_raw_number), lambda pipe: example, "-k", "one_image", "-rs") == {}
    for undue in ({"undo": "please"}, {"agreement": " "}):
        with pytest.raises(ValueError, match="exempt="):
            Example(exempt=undue)


# -- the pytest plug-in ------------------------------------------------------------------------------------------------
def test_a_mistaken_name_is_a_usage_error(tmp_path: Path) -> None:
    result = run_kit(tmp_path, "--trimtab-plugin", "pagg")
    assert result.code == pytest.ExitCode.USAGE_ERROR
    assert "--trimtab-plugin pagg: There is no guidance 'pagg'. Did you mean 'pag'?" in result.text


def test_without_hypothesis_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run_kit(tmp_path, "--trimtab-plugin", "pag")
    assert result.code == pytest.ExitCode.USAGE_ERROR
    assert "pip install 'trimtab[kit]'" in result.text


def test_the_option_runs_the_kit_alone_and_the_setting_beside_the_suite(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("def test_mine(): pass")
    listing = ("--collect-only", "-q", "-k", "mine or acts")
    kit, mine = "trimtab-conformance/effect::test_it_acts[pag]", "test_mine.py::test_mine"
    alone = run_kit(tmp_path, "--trimtab-plugin", "pag", *listing).text
    assert kit in alone and mine not in alone
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrimtab_plugins = pag")
    both = run_kit(tmp_path, *listing).text
    assert kit in both and mine in both


def test_a_check_runs_again_by_the_id_that_a_report_shows(tmp_path: Path) -> None:
    listed = run_kit(tmp_path, "--trimtab-plugin", "pag", "--collect-only", "-q", "-k", "determin").text.splitlines()
    first, second, *_ = (line for line in listed if "::" in line)
    result = run_kit(tmp_path, "--trimtab-plugin", "pag", first)
    assert [report.nodeid for report in result.reports] == [first] and result.code == 0 and second != first
    mistaken = run_kit(tmp_path, "--trimtab-plugin", "pag", "trimtab-conformance/conduct::test_nothing")
    assert mistaken.code == pytest.ExitCode.USAGE_ERROR and "there is no such check" in mistaken.text


def test_the_fixture_hides_all_plug_ins_but_those_it_is_given(isolated_plugins: Any) -> None:
    assert trimtab.plugins() == {}
    isolated_plugins(Away)
    assert list(trimtab.plugins()) == ["test.away"]


def test_a_session_that_checks_nothing_imports_nothing_of_ours() -> None:
    program = "import sys, pytest, pytest_trimtab; print({'torch', 'diffusers', 'trimtab'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_differs_a_little_is_not_said_to_differ_by_nothing() -> None:
    assert [percent(share) for share in (1.3e-6, 0.013, 1.0, float("nan"))] == ["0.0001%", "1.3%", "100.0%", "nan%"]
