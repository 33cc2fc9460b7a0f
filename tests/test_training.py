"""The training loop: it stops and continues as if it had not stopped, whatever the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import training_programs as programs
from processes import together
from torch import nn
from torch.utils.data import TensorDataset

from trimtab.guidance.errors import ParameterError
from trimtab.training import TrainingSettings, train
from trimtab.training.log import read_log, summary, validations


class Interrupt:
    """Lets a number of losses through, then interrupts."""

    def __init__(self, after: int | None = None) -> None:
        self.left = after

    def __call__(self, model: Any, batch: Any, generator: torch.Generator) -> torch.Tensor:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        x, y = batch
        noise = torch.randn(x.shape, generator=generator)
        return (model(x + 0.1 * noise) - y).square().mean()


def build() -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    x = torch.randn(48, 3)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), TensorDataset(x, x.sum(1, keepdim=True))


def run(output: Path, loss: Any = None, freeze: bool = False, **settings: Any) -> tuple[dict[str, torch.Tensor], bool]:
    """The exported weights, and whether the run finished."""
    model, data = build()
    if freeze:
        model[0].requires_grad_(False)
    exported: dict[str, torch.Tensor] = {}
    options = {"steps": 7, "batch_size": 8, "warmup": 1, "checkpoint_every": 2, "validate_every": 3, **settings}
    done = train(
        "toy",
        model,
        data,
        loss or Interrupt(),
        TrainingSettings(output=str(output), **options),
        lambda finished: exported.update({k: v.detach().clone() for k, v in finished.state_dict().items()}),
        lambda candidate: {"error": float(candidate[1].weight.abs().sum())},
    )
    return exported, done


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.allclose(one[k], other[k], atol=1e-7) for k in one)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_an_interrupted_run_continues_as_if_it_had_not_stopped(
    tmp_path: Path, accumulate: int, ema_decay: float
) -> None:
    options = {"accumulate": accumulate, "ema_decay": ema_decay}
    whole, done = run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", Interrupt(after=5 * accumulate), **options)
    parts, also_done = run(tmp_path / "parts", **options)
    assert done and also_done
    assert_equal(whole, parts)
    losses = [[row["loss"] for row in read_log(tmp_path / folder)] for folder in ("whole", "parts")]
    assert len(losses[0]) == 7 and losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_log_of_a_run_that_was_killed_and_continued_has_each_step_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupt(after=5))
    log = tmp_path / "log.jsonl"
    with log.open("a") as file:
        file.write('{"step": 6, "lo')  # as a kill in the middle of a line would leave it
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4, 5]
    assert run(tmp_path)[1]
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4, 5, 6, 7]


def test_one_command_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    def another(model: Any, batch: Any, generator: torch.Generator) -> torch.Tensor:
        with pytest.raises(ParameterError, match=r"train toy: output='.*here': another command trains there; "):
            run(tmp_path / "here", learning_rate=1.0)
        return Interrupt()(model, batch, generator)

    assert run(tmp_path / "here", another, steps=1)[1]
    assert run(tmp_path / "here", steps=1)[1], "the lock ends with the run"


def test_a_limit_of_time_ends_a_run_that_the_same_command_continues(tmp_path: Path) -> None:
    _, done = run(tmp_path / "limited", minutes=1e-9)
    assert not done
    limited, done = run(tmp_path / "limited")
    whole, _ = run(tmp_path / "whole")
    assert done
    assert_equal(whole, limited)


def test_the_first_process_whose_time_is_up_ends_the_run_of_all(tmp_path: Path) -> None:
    ends = together(2, programs.run_out, tmp_path, str(tmp_path), [1e9, 1e-2])
    assert ends[0] == ends[1] and ends[0][0] > 0
    assert (tmp_path / "toy" / "checkpoints" / "checkpoint_0" / "whole").exists()


def test_a_checkpoint_that_was_cut_off_is_not_what_a_run_goes_on_from(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", Interrupt(5))
    checkpoints = tmp_path / "stopped" / "checkpoints"
    for path in (checkpoints / "checkpoint_1").iterdir():  # as a kill in the middle of writing it would leave it
        if path.name != "model.safetensors":
            path.unlink()
    (checkpoints / "checkpoint_2").mkdir()
    resumed, done = run(tmp_path / "stopped")
    assert done
    assert_equal(whole, resumed)


@pytest.mark.parametrize(("name", "value"), [("learning_rate", 1e-5), ("seed", 3), ("batch_size", 4), ("steps", 9)])
def test_a_run_goes_on_with_the_settings_that_it_was_begun_with(tmp_path: Path, name: str, value: Any) -> None:
    run(tmp_path)
    with pytest.raises(ParameterError, match=rf"train toy: {name}={value!r}, but .* made with {name}="):
        run(tmp_path, **{name: value})
    assert run(tmp_path, checkpoint_every=5)[1], "how often it is saved may change"


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    run(tmp_path)
    exported, done = run(tmp_path, Interrupt(after=0))
    assert done and not exported


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    before = build()[0].state_dict()
    after, _ = run(tmp_path, freeze=True, ema_decay=0.0)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1.weight", "1.bias"}


def test_two_accumulated_batches_are_one_of_twice_the_size(tmp_path: Path) -> None:
    """Up to the noise, which is drawn for each batch: without it the steps are equal."""

    def plain(model: Any, batch: Any, generator: torch.Generator) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    one, _ = run(tmp_path / "one", plain, batch_size=12, steps=4)
    two, _ = run(tmp_path / "two", plain, batch_size=6, accumulate=2, steps=4)
    assert_equal(one, two)


def test_the_log_says_what_a_card_needs(tmp_path: Path) -> None:
    run(tmp_path)
    rows = read_log(tmp_path)
    said = summary(rows)
    assert [row["step"] for row in rows if "error" in row] == [3, 6, 7]
    assert said["error"] == rows[-1]["error"] and said["hours"] > 0
    assert said["loss"] == pytest.approx(sum(row["loss"] for row in rows) / 7)


def test_too_few_samples_for_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="batch_size=49: the data make 0 whole batches for 1 processes"):
        run(tmp_path, batch_size=49)


def test_what_was_validated_is_listed_in_the_order_of_the_log() -> None:
    names = [f"measure {number}" for number in range(9, 0, -1)]
    row = {"step": 3, "loss": 0.5, "lr": 0.1, "seconds": 1.0, **dict.fromkeys(names, 2.0)}
    assert list(validations([row]).items()) == [(name, [(3, 2.0)]) for name in names]
