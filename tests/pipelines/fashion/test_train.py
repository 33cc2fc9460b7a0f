"""Training makes the loss fall, stops and continues as if it had not stopped, and writes a complete model."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import training_programs as programs
from processes import together

from trimtab.pipelines.fashion import ClassConditionalPipeline
from trimtab.pipelines.fashion import train as training
from trimtab.pipelines.fashion.data import CLASS_NAMES, load
from trimtab.pipelines.fashion.train import BaseSettings, train_base


def write_idx(path: Path, array: np.ndarray) -> None:
    header = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sixty-four bright squares whose side tells their class."""
    folder = tmp_path / "data"
    folder.mkdir()
    labels = np.arange(64) % 10
    images = np.zeros((64, 28, 28))
    for image, label in zip(images, labels, strict=True):
        image[4 : 8 + 2 * label, 4 : 8 + 2 * label] = 255
    for split in ("train", "t10k"):
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)
    return folder


def config(data: Path, output: Path, steps: int) -> BaseSettings:
    return BaseSettings(
        output=str(output), data=str(data), steps=steps, batch_size=16, warmup=1, checkpoint_every=2, validate_every=2
    )


def weights(folder: Path) -> torch.Tensor:
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    return torch.cat([parameter.flatten() for parameter in pipe.unet.parameters()])


def test_images_are_padded_with_background_and_scaled(data: Path) -> None:
    images, labels = load("train", data)
    assert images.shape == (64, 1, 32, 32) and images.min() == -1 and images.max() == 1
    assert (images[:, :, :2] == -1).all() and labels.tolist()[:3] == [0, 1, 2]


def test_missing_data_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist.*--data"):
        load("train", tmp_path)


def test_what_is_not_idx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"hello, world"))
    with pytest.raises(ValueError, match="is not an IDX file"):
        load("train", tmp_path)


def test_an_interrupted_run_continues_where_it_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps at once, and five with an interruption after the third: the log and the weights are the same."""
    whole = train_base(config(data, tmp_path / "whole", 5))

    real, calls = training.velocity_loss, []

    def failing(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:  # three steps and one validation loss have been computed
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "velocity_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        train_base(config(data, tmp_path / "parts", 5))
    monkeypatch.setattr(training, "velocity_loss", real)
    parts = train_base(config(data, tmp_path / "parts", 5))

    assert torch.allclose(weights(whole), weights(parts), atol=1e-6)
    logs = [
        {row["step"]: row["loss"] for row in map(json.loads, (folder.parent / "log.jsonl").read_text().splitlines())}
        for folder in (whole, parts)
    ]
    assert logs[0].keys() == logs[1].keys() == {1, 2, 3, 4, 5}
    assert logs[0] == pytest.approx(logs[1], abs=1e-5)


def test_the_loss_falls_and_the_model_is_complete(data: Path, tmp_path: Path) -> None:
    folder = train_base(config(data, tmp_path / "run", 12))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert validation[-1] < 0.8 * validation[0]
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    assert tuple(pipe.class_names) == CLASS_NAMES and pipe.scheduler.config.clip_sample is False
    card = (folder / "README.md").read_text()
    assert "12 steps of 16 images" in card and "MIT" in card and "Apache-2.0" in card
    settings = json.loads((folder / "training.json").read_text())
    assert settings["steps"] == 12 and "output" not in settings and "data" not in settings


def test_two_processes_resume_to_the_same_losses_and_weights(data: Path, tmp_path: Path) -> None:
    """Gradients of two batches, bfloat16."""
    programs.check(
        together(2, programs.resume, tmp_path / "two", str(tmp_path), {"base": {"data": str(data)}}, seconds=600)
    )
