"""A recipe says which files a guidance loaded: the hash of a local file here, a commit of the Hub in `test_hub.py`."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from zoo import CASES, run

import trimtab
from trimtab import WeightsError
from trimtab.adapters.weights import load_weights, save_weights
from trimtab.guidance import pins, recipe, source
from trimtab.guidance.registry import create

TENSORS = {"a": torch.ones(2)}


def test_a_folder_has_no_commit_and_a_commit_stays(tmp_path: Path) -> None:
    assert pins.commit(tmp_path, "main") == "main"
    assert pins.commit(None, None) is None
    assert pins.commit("owner/name", "0" * 40) == "0" * 40


def test_the_hash_is_that_of_the_file_which_would_be_loaded(tmp_path: Path) -> None:
    file = save_weights(tmp_path / "one.safetensors", TENSORS)
    digest = load_weights(tmp_path).sha256
    assert pins.sha256(file, None) == pins.sha256(tmp_path, None) == pins.sha256(tmp_path, "one.safetensors") == digest
    save_weights(tmp_path / "two.safetensors", TENSORS)
    assert pins.sha256(tmp_path, None) is None, "which of the two is meant, nobody knows"
    assert pins.sha256(tmp_path, "three.safetensors") is None
    assert pins.sha256("owner/name", "one.safetensors") is None, "its commit says as much"


def test_a_fingerprint_is_of_names_and_contents_and_of_nothing_else(tmp_path: Path) -> None:
    model, copy = tmp_path / "model", tmp_path / "copy"
    file = save_weights(model / "unet" / "weights.safetensors", TENSORS)
    (model / "model_index.json").write_text("{}")
    shutil.copytree(model, copy)
    os.utime(copy / "model_index.json", (0, 0))
    (copy / "README.md").write_text("What nobody loads.")
    fingerprint = pins.fingerprint(model)
    assert fingerprint is not None and pins.fingerprint(copy) == fingerprint
    save_weights(file, {"a": torch.zeros(2)})
    assert pins.fingerprint(model) != fingerprint
    (copy / "model_index.json").rename(copy / "other.json")
    assert pins.fingerprint(copy) != fingerprint
    assert pins.fingerprint("owner/name") is None, "its commit says as much"
    assert pins.fingerprint(file) == pins.fingerprint(shutil.copy(file, tmp_path)) != pins.fingerprint(copy)


def test_a_fingerprint_reads_a_part_of_everything_in_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pins, "WHOLE", 0)
    file = tmp_path / "weights.bin"
    content = bytearray(4 * pins.EVERY)
    file.write_bytes(content)
    before = pins.fingerprint(file)
    content[3 * pins.EVERY + 7] = 1
    file.write_bytes(content)
    assert pins.fingerprint(file) != before


@pytest.mark.parametrize(
    "name, more",
    [("smooth", {}), ("easycontrol", {"image": "edges.png"}), ("ppap", {"target": 1, "classifier": "google/vit"})],
)
def test_weights_that_were_written_anew_are_not_taken_for_those_of_the_recipe(
    name: str, more: dict[str, object], tmp_path: Path
) -> None:
    file = save_weights(tmp_path / "weights.safetensors", TENSORS)
    recipe.save(tmp_path, {name: create(name, weights=str(file), **more)})
    recorded = recipe.read(tmp_path)[name].parameters
    assert recorded["sha256"] == source.sha256(file)
    save_weights(file, {"a": torch.zeros(2)})
    with pytest.raises(WeightsError, match="It is another file than the one meant"):
        load_weights(str(recorded["weights"]), sha256=str(recorded["sha256"]))


def test_the_hash_of_a_listing_is_that_of_what_sha256sum_writes(tmp_path: Path) -> None:
    save_weights(tmp_path / "unet" / "weights.safetensors", TENSORS)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("What nobody loads.")
    command = ["sha256sum", "config.json", "unet/weights.safetensors"]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    assert pins.listing_sha256(tmp_path) == hashlib.sha256(listed).hexdigest()
    assert pins.listing_sha256("owner/name") is None and pins.listing_sha256(None) is None


@pytest.mark.parametrize(
    "name, parameter, more",
    [
        ("joint", "weights", {"image": "edges.png"}),
        ("classifier", "classifier", {"target": 1}),
        ("autoguidance", "weak", {}),
    ],
)
def test_a_recipe_notes_the_files_of_a_folder(
    name: str, parameter: str, more: dict[str, object], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    save_weights(folder / "weights.safetensors", TENSORS)
    recipe.save(tmp_path / "recipe", {name: create(name, **{parameter: str(folder)}, **more)})
    recorded = recipe.read(tmp_path / "recipe")[name].parameters
    assert recorded["files_sha256"] == pins.listing_sha256(folder)
    pins.check_listing(folder, str(recorded["files_sha256"]), name)
    save_weights(folder / "weights.safetensors", {"a": torch.zeros(2)})
    with pytest.raises(WeightsError, match=f"{name}: files_sha256=.* They were changed"):
        pins.check_listing(folder, str(recorded["files_sha256"]), name)


def test_a_weaker_model_that_was_trained_anew_is_refused_before_the_run(tmp_path: Path) -> None:
    case = CASES["sd15"]
    case.build().unet.save_pretrained(tmp_path / "weak")
    pipe = trimtab.guide(case.build())
    pipe.add_guidance("autoguidance", weak=str(tmp_path / "weak"))
    pipe.save_guidance(tmp_path / "recipe")
    pipe.clear_guidance()
    pipe.load_guidance(tmp_path / "recipe")
    run(pipe, case)
    (tmp_path / "weak" / "config.json").write_text((tmp_path / "weak" / "config.json").read_text() + "\n")
    with pytest.raises(WeightsError, match="autoguidance: files_sha256="):
        run(pipe, case)


def test_a_hash_that_was_asked_for_stays_and_the_guidance_itself_does_not_change(tmp_path: Path) -> None:
    file = save_weights(tmp_path / "weights.safetensors", TENSORS)
    smooth = create("smooth", weights=str(file))
    assert smooth.pinned() is not smooth and smooth.parameters["sha256"] is None
    assert create("smooth", weights=str(file), sha256="0" * 64).pinned().parameters["sha256"] == "0" * 64


def test_what_loads_no_files_is_itself() -> None:
    pag = create("pag")
    assert pag.pinned() is pag
