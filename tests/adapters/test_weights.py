"""Adapter weights: safetensors come back as they were saved; everything else is refused before it is opened."""

from __future__ import annotations

import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import serve
from safetensors.torch import save as serialized

from trimtab import SourceError, WeightsError
from trimtab.adapters.weights import load_weights, save_weights
from trimtab.guidance.source import sha256

TENSORS = {"up": torch.arange(6.0).reshape(2, 3), "down": torch.ones(3, dtype=torch.bfloat16)}


class Payload:
    """What a hostile checkpoint does when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_weights(tmp_path / "adapter" / "lora.safetensors", TENSORS, {"rank": "4"})
    return tmp_path / "adapter"


def test_what_is_saved_comes_back_with_its_origin(folder: Path) -> None:
    for source, name in ((folder, None), (folder, "lora.safetensors"), (folder / "lora.safetensors", None)):
        loaded = load_weights(source, weight_name=name)
        assert loaded.tensors.keys() == TENSORS.keys()
        for key, tensor in TENSORS.items():
            assert loaded.tensors[key].dtype == tensor.dtype and torch.equal(loaded.tensors[key], tensor)
        assert loaded.metadata == {"rank": "4"} and loaded.commit is None
        assert loaded.path == folder / "lora.safetensors" and loaded.sha256 == sha256(loaded.path)


def test_tensors_that_share_memory_or_need_gradients_are_saved(tmp_path: Path) -> None:
    whole = torch.arange(6.0, requires_grad=True)
    path = save_weights(tmp_path / "w.safetensors", {"whole": whole, "half": whole[::2], "turned": whole.view(2, 3).T})
    loaded = load_weights(path).tensors
    assert torch.equal(loaded["half"], whole[::2]) and torch.equal(loaded["turned"], whole.view(2, 3).T)


def test_a_saved_file_can_be_read_by_whoever_can_read_the_files_beside_it(folder: Path) -> None:
    (folder / "beside").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert len(modes) == 1


def test_several_files_need_a_name(folder: Path) -> None:
    save_weights(folder / "second" / "lora.safetensors", TENSORS)
    with pytest.raises(WeightsError, match=r"several files: lora\.safetensors, second/lora\.safetensors; choose one"):
        load_weights(folder)
    assert load_weights(folder, weight_name="second/lora.safetensors").path.parent.name == "second"


def test_a_folder_without_weights_and_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no \.safetensors file"):
        load_weights(tmp_path)
    with pytest.raises(SourceError, match="There is no file or folder 'nowhere'"):
        load_weights("nowhere")
    with pytest.raises(SourceError, match=r"no file 'x\.safetensors' in"):
        load_weights(tmp_path, weight_name="x.safetensors")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ""])
def test_pickles_are_refused_by_their_name(tmp_path: Path, suffix: str) -> None:
    mark = tmp_path / "mark"
    (tmp_path / f"lora{suffix}").write_bytes(pickle.dumps(Payload(mark)))
    for source, name in ((tmp_path / f"lora{suffix}", None), (tmp_path, f"lora{suffix}")):
        with pytest.raises(WeightsError, match=r"only \.safetensors files are loaded.*pickles, which run code"):
            load_weights(source, weight_name=name)
    with pytest.raises(WeightsError, match=r"has no \.safetensors file"):
        load_weights(tmp_path)
    assert not mark.exists()


def test_a_pickle_under_another_name_is_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "lora.safetensors"
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(WeightsError, match="is no safetensors file"):
        load_weights(path)
    torch.save(Payload(mark), path)
    with pytest.raises(WeightsError, match="is no safetensors file"):
        load_weights(path)
    assert not mark.exists()


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-3], lambda data: b"\xff" * 8 + data])
def test_a_damaged_file_is_one_clear_error(folder: Path, damage: object) -> None:
    path = folder / "lora.safetensors"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(WeightsError, match="is no safetensors file that can be read"):
        load_weights(folder)


def test_a_hash_must_be_that_of_the_file(folder: Path) -> None:
    right = sha256(folder / "lora.safetensors")
    assert load_weights(folder, sha256=right.upper()).sha256 == right
    with pytest.raises(WeightsError, match=f"its SHA-256 is {right}, not {'0' * 64}"):
        load_weights(folder, sha256="0" * 64)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "C:\\x.safetensors", "a//x.safetensors"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    save_weights(folder.parent / "x.safetensors", TENSORS)
    with pytest.raises(SourceError, match="is no name of a file inside a folder"):
        load_weights(folder, weight_name=name)


def test_the_folder_of_a_repositorys_file_may_be_left_out_where_only_one_has_it(tmp_path: Path) -> None:
    """As `weight_name="canny.safetensors"` means `models/canny.safetensors` of the published EasyControl."""
    files = ("models/canny", "models/depth", "old/depth")
    with serve() as hub:
        hub.add("owner/control", {f"{name}.safetensors": serialized({name: torch.ones(1)}) for name in files})
        options: dict[str, Any] = {"endpoint": hub.endpoint, "cache_dir": tmp_path, "token": False}
        for name in ("canny.safetensors", "models/canny.safetensors"):
            assert load_weights("owner/control", weight_name=name, **options).tensors.keys() == {"models/canny"}
        for name in ("depth.safetensors", "pose.safetensors"):
            with pytest.raises(SourceError, match=f"no file '{name}' in 'owner/control'"):
                load_weights("owner/control", weight_name=name, **options)


def test_only_safetensors_are_written(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"only \.safetensors"):
        save_weights(tmp_path / "w.bin", TENSORS)
    assert not list(tmp_path.iterdir())
