"""Recipes, adapters and pipelines through the real client, from a Hub on loopback that also misbehaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import torch
from hub import Hub, serve
from paint import Paint, full
from PIL import Image
from safetensors.torch import save
from torch import nn
from zoo import CASES

import trimtab
from trimtab import RecipeError, SourceError, WeightsError
from trimtab.adapters.ppap.experts import Experts, load_experts
from trimtab.adapters.unicon.checkpoint import load as load_unicon
from trimtab.adapters.unicon.checkpoint import save as save_unicon
from trimtab.adapters.unicon.train import UniConSettings, UniConTraining
from trimtab.adapters.weights import load_weights
from trimtab.guidance import pins, recipe
from trimtab.guidance.registry import create
from trimtab.guidance.shipped import located

TENSORS = {"up": torch.arange(6.0), "down": torch.ones(2, 2)}
RECIPE = json.dumps(recipe.dump({"pag": trimtab.guidance.registry.create("pag", scale=2.0)})).encode()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub, and a client that waits for it for a moment only."""
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(huggingface_hub.constants, name, 0.3)
    monkeypatch.setattr(huggingface_hub.file_download, "_ETAG_RETRY_TIMEOUT", 0.3)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # uploads by the LFS protocol
    for module in (huggingface_hub.file_download, huggingface_hub.utils._http):
        monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with serve() as hub:
        yield hub


@pytest.fixture
def options(hub: Hub, tmp_path: Path) -> dict[str, Any]:
    return {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache", "token": False}


# -- adapters ----------------------------------------------------------------------------------------------------------
def test_weights_of_a_branch_a_commit_and_the_only_file(hub: Hub, options: dict[str, Any]) -> None:
    first = hub.add("owner/lora", {"lora.safetensors": save(TENSORS, {"rank": "4"}), "README.md": b"# LoRA"})
    second = hub.add("owner/lora", {"lora.safetensors": save({"up": torch.zeros(1)})})
    newest = load_weights("owner/lora", **options)
    assert newest.commit == second and newest.tensors.keys() == {"up"}
    pinned = load_weights("owner/lora", weight_name="lora.safetensors", revision=first, **options)
    assert (
        pinned.commit == first and torch.equal(pinned.tensors["up"], TENSORS["up"]) and pinned.metadata == {"rank": "4"}
    )
    assert load_weights("owner/lora", sha256=pinned.sha256, revision=first, **options).sha256 == pinned.sha256


def test_a_file_in_the_cache_needs_no_hub(hub: Hub, options: dict[str, Any]) -> None:
    commit = hub.add("owner/lora", {"lora.safetensors": save(TENSORS)})
    load_weights("owner/lora", **options)
    asked = len(hub.requests)
    for more in ({}, {"weight_name": "lora.safetensors"}, {"revision": commit}):
        assert load_weights("owner/lora", local_files_only=True, **more, **options).commit == commit
    assert len(hub.requests) == asked
    hub.faults["lora.safetensors"] = "silent"
    assert load_weights("owner/lora", weight_name="lora.safetensors", **options).commit == commit


def test_what_is_not_there(hub: Hub, options: dict[str, Any]) -> None:
    hub.add("owner/lora", {"lora.safetensors": save(TENSORS), "lora.bin": b"", "old.pt": b""})
    for arguments, message in (
        (
            ("owner/none", {}),
            r"no folder 'owner/none', and the Hub shows no such repository \(HTTP 401\): check the name",
        ),
        (("owner/lora", {"weight_name": "x.safetensors"}), r"no file 'x\.safetensors' in 'owner/lora' on the Hub"),
        (
            ("owner/lora", {"revision": "v9"}),
            r"'owner/lora' has no revision 'v9'; allowed: a branch, a tag or a commit",
        ),
        (("owner/lora", {"revision": "v9", "weight_name": "lora.safetensors"}), "has no revision 'v9'"),
        (("owner/none", {"local_files_only": True}), "not in the cache, and the Hub may not be asked"),
    ):
        source, more = arguments
        with pytest.raises(SourceError, match=message):
            load_weights(source, **more, **options)


def test_a_private_repository_needs_its_token(hub: Hub, options: dict[str, Any]) -> None:
    hub.add("owner/private", {"lora.safetensors": save(TENSORS)})
    hub.tokens["owner/private"] = "secret"
    for token in (False, "wrong"):
        with pytest.raises(SourceError, match=r"HTTP 401.*hf auth login"):
            load_weights("owner/private", **{**options, "token": token})
    assert load_weights("owner/private", **{**options, "token": "secret"}).tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize("name", ["lora.bin", "lora.pt"])
def test_pickles_are_not_even_asked_for(hub: Hub, options: dict[str, Any], name: str) -> None:
    hub.add("owner/lora", {name: b"\x80\x04."})
    with pytest.raises(WeightsError, match=r"only \.safetensors"):
        load_weights("owner/lora", weight_name=name, **options)
    assert not hub.requests
    with pytest.raises(WeightsError, match=r"has no \.safetensors file"):
        load_weights("owner/lora", **options)
    assert not [request for request in hub.requests if name in request]


@pytest.mark.parametrize("fault", ["truncated", "hangs", "silent"])
def test_a_broken_download_leaves_nothing_behind(hub: Hub, options: dict[str, Any], fault: str) -> None:
    hub.add("owner/lora", {"lora.safetensors": save(TENSORS)})
    hub.faults["lora.safetensors"] = fault
    with pytest.raises(SourceError, match="did not arrive whole" if fault != "silent" else "Hub cannot be reached"):
        load_weights("owner/lora", weight_name="lora.safetensors", **options)
    hub.faults.clear()
    assert load_weights("owner/lora", **options).tensors.keys() == TENSORS.keys()


def test_a_unicon_model_of_which_a_part_does_not_arrive_is_not_taken_for_one_without_it(
    hub: Hub, options: dict[str, Any], tmp_path: Path
) -> None:
    unet = CASES["sd15"].build().unet
    save_unicon(tmp_path / "depth", UniConTraining(unet, UniConSettings(rank=4)).blocks)
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    own = "depth/y_lora/pytorch_lora_weights.safetensors"
    hub.add("owner/unicon", files)
    hub.faults[own] = "truncated"
    with pytest.raises(SourceError, match=r"y_lora/pytorch.*did not arrive whole"):
        load_unicon("owner/unicon", unet, subfolder="depth", **options)
    hub.faults.clear()
    assert all(block.y_own for block in load_unicon("owner/unicon", unet, subfolder="depth", **options).values())
    hub.add("owner/without", {name: data for name, data in files.items() if name != own})
    found = load_unicon("owner/without", unet, subfolder="depth", **options)
    assert found and not any(block.y_own for block in found.values())
    with pytest.raises(SourceError, match="the Hub shows no such repository"):
        load_unicon("owner/none", unet, subfolder="depth", **options)


def test_experts_are_one_file_that_loads_from_the_hub(hub: Hub, options: dict[str, Any], tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    experts, images = Experts(network, 2, rank=1), torch.ones(1, 1, 8, 8)
    for index in range(experts.count):
        for parameter in experts.parameters_of(index).values():
            parameter.data.add_(0.1 + index)
    hub.add("owner/experts", {"ppap.safetensors": experts.save(tmp_path / "ppap.safetensors").read_bytes()})
    again = load_experts(network, load_weights("owner/experts", **options))
    for timestep in (torch.tensor([10]), torch.tensor([900])):
        assert torch.equal(again(images, timestep), experts(images, timestep))
        assert not torch.equal(again(images, timestep), network(images))


def test_another_hash_is_refused(hub: Hub, options: dict[str, Any]) -> None:
    hub.add("owner/lora", {"lora.safetensors": save(TENSORS)})
    with pytest.raises(WeightsError, match=f"its SHA-256 is .*, not {'0' * 64}"):
        load_weights("owner/lora", sha256="0" * 64, **options)
    loaded = load_weights("owner/lora", **options)
    loaded.path.resolve().write_bytes(save({"up": torch.zeros(6), "down": torch.ones(2, 2)}))
    with pytest.raises(WeightsError, match=f"not {loaded.sha256}.*force_download=True"):
        load_weights("owner/lora", **options)
    assert load_weights("owner/lora", force_download=True, **options).sha256 == loaded.sha256


# -- recipes -----------------------------------------------------------------------------------------------------------
def test_a_recipe_of_a_branch_and_of_a_commit(hub: Hub, options: dict[str, Any]) -> None:
    first = hub.add("owner/recipe", {"guidance.json": RECIPE})
    hub.add("owner/recipe", {"guidance.json": RECIPE.replace(b'"scale": 2.0', b'"scale": 1.0')})
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.load_guidance("owner/recipe", **options)
    assert pipe.guidances["pag"].scale == 1.0
    pipe.load_guidance("owner/recipe", revision=first, **options)
    assert pipe.guidances["pag"].scale == 2.0


def test_what_is_pushed_loads_again_with_its_files(hub: Hub, options: dict[str, Any]) -> None:
    trimtab.register(Paint)
    try:
        pipe = trimtab.guide(CASES["ddpm"].build())
        pipe.add_guidance(full())
        commit = pipe.push_guidance_to_hub("owner/new", endpoint=hub.endpoint, token="write")
        assert hub.commits["owner/new"][-1][0] == commit
        hub.add("owner/new", {"guidance.json": b"{}"})  # the branch has moved on
        pipe.clear_guidance()
        pipe.load_guidance("owner/new", revision=commit, **options)
        loaded = pipe.guidances["test.paint"].parameters
        assert torch.equal(loaded["target"], full().parameters["target"])
        assert isinstance(loaded["mask"], Image.Image)
    finally:
        trimtab.unregister("test.paint")


def test_a_recipe_names_the_commit_that_a_branch_is_at(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    commit = hub.add("owner/lora", {"lora.safetensors": save(TENSORS)})
    recipe.save(tmp_path, {"smooth": create("smooth", weights="owner/lora")})
    hub.add("owner/lora", {"lora.safetensors": save({"up": torch.zeros(1)})})
    assert recipe.read(tmp_path)["smooth"].parameters["revision"] == commit
    assert not [request for request in hub.requests if "resolve" in request], "nothing is downloaded for it"


def test_without_the_hub_a_recipe_names_the_commit_in_the_cache(
    hub: Hub, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(options["cache_dir"]))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert pins.commit("owner/lora", "main") == "main", "nobody knows it"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    commit = hub.add("owner/lora", {"lora.safetensors": save(TENSORS)})
    load_weights("owner/lora", **options)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert pins.commit("owner/lora", None) == commit


def test_what_was_loaded_by_its_commit_is_what_the_branch_means_once_offline(
    hub: Hub, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(options["cache_dir"]))
    hub.add("owner/lora", {"lora.safetensors": save({"up": torch.zeros(1)})})
    load_weights("owner/lora", **options)
    newer = hub.add("owner/lora", {"lora.safetensors": save(TENSORS)})
    with monkeypatch.context() as online:
        online.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        assert pins.commit("owner/lora", None) == newer
    load_weights("owner/lora", revision=newer, **options)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert pins.commit("owner/lora", None) == newer
    assert load_weights("owner/lora", local_files_only=True, **options).commit == newer


def test_a_push_without_leave_sends_nothing(hub: Hub) -> None:
    pipe = trimtab.guide(CASES["sd15"].build())
    pipe.add_guidance("pag")
    with pytest.raises(SourceError, match=r"was not pushed to 'owner/new': .*401.*pass token="):
        pipe.push_guidance_to_hub("owner/new", endpoint=hub.endpoint, token="wrong")
    assert not hub.commits and not hub.uploads


def test_a_recipe_that_is_missing_too_large_or_hostile(hub: Hub, options: dict[str, Any]) -> None:
    hub.add("owner/none", {"README.md": b""})
    with pytest.raises(SourceError, match=r"no file 'guidance\.json' in 'owner/none' on the Hub"):
        recipe.read("owner/none", **options)
    hub.add("owner/large", {"guidance.json": b" " * (2**20 + 1)})
    with pytest.raises(SourceError, match=r"has 1,048,577 bytes; allowed: at most 1,048,576"):
        recipe.read("owner/large", **options)
    assert not [request for request in hub.requests if request.startswith("GET /owner/large")]
    hub.add("owner/deep", {"guidance.json": b'{"a":' * 90_000})
    with pytest.raises(RecipeError, match="is not JSON"):
        recipe.read("owner/deep", **options)


# -- pipelines: Diffusers reads its Hub from the environment when it is imported ---------------------------------------
PIPELINE_CODE = b"""
from diffusers import StableDiffusionPipeline
print("CODE RAN")
class MyPipeline(StableDiffusionPipeline):
    pass
"""


def session(hub: Hub, home: Path, script: str, **environment: str) -> str:
    """What a script printed that ran with this Hub and this cache."""
    variables = {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", **environment,
    }  # fmt: skip
    variables.pop("HF_TOKEN", None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_weaker_model_of_a_revision_and_the_commit_of_it_in_a_recipe(hub: Hub, tmp_path: Path) -> None:
    pipe = CASES["sd15"].build()
    pipe.save_pretrained(tmp_path / "model")
    commits = []
    for number in range(2):
        with torch.no_grad():
            pipe.unet.conv_out.weight.mul_(0.5)
        pipe.unet.save_pretrained(tmp_path / f"weak{number}")
        commits.append(hub.add("owner/weak", files_of(tmp_path / f"weak{number}")))
    script = f"""
        import torch
        from trimtab import GuidedPipeline
        pipe = GuidedPipeline.from_pretrained({str(tmp_path / "model")!r})
        pipe.set_progress_bar_config(disable=True)
        def made(**weak):
            with pipe.guidance("autoguidance", **weak):
                pipe.explain_guidance(num_inference_steps=2, prompt="a")
                seeded = torch.Generator().manual_seed(0)
                return pipe("a", num_inference_steps=2, generator=seeded, output_type="latent").images
        local = [made(weak={str(tmp_path)!r} + f"/weak{{number}}") for number in range(2)]
        print(not torch.equal(*local))
        print(torch.equal(made(weak="owner/weak", revision={commits[0]!r}), local[0]))
        print(torch.equal(made(weak="owner/weak"), local[1]))
        auto = pipe.add_guidance("autoguidance", weak="owner/weak")
        print(auto.pinned().revision == {commits[1]!r})
    """
    lines = session(hub, tmp_path / "home", script).splitlines()
    assert [line for line in lines if line in ("True", "False")] == ["True"] * 4


def test_the_classes_of_a_class_conditional_model_are_not_taken_for_its_components(hub: Hub, tmp_path: Path) -> None:
    files = files_of(Path(str(located("trimtab/fashion"))))
    hub.add("owner/garments", files)
    bomb = b'{"a":' * 50_000
    for name, changed in (
        ("list", {"model_index.json": b"[1]"}),
        ("empty", {"unet/config.json": b"[]"}),
        ("deep", {"unet/names.json": bomb}),
    ):
        hub.add(f"owner/{name}", {**files, **changed})
    script = """
        from trimtab import GuidedPipeline, TrimtabError
        for name in ("garments", "list", "empty", "deep"):
            try:
                pipe = GuidedPipeline.from_pretrained(f"owner/{name}")
            except TrimtabError as error:
                print(name, "|", error)
            else:
                pipe.set_progress_bar_config(disable=True)
                print(name, "|", pipe("Bag", num_inference_steps=1).images[0].size)
    """
    whole, listed, empty, deep = session(hub, tmp_path / "home", script).splitlines()
    assert whole == "garments | (32, 32)"
    assert "model_index.json is a JSON list; needed: names with their values" in listed
    assert "unet/config.json is a JSON list" in empty and "unet/names.json is no JSON that a model" in deep
    alone = script.replace('"list", "empty", "deep"', "")
    assert session(hub, tmp_path / "home", alone, HF_HUB_OFFLINE="1").splitlines() == [whole]


def test_pipelines_online_and_then_offline(hub: Hub, tmp_path: Path) -> None:
    CASES["sd15"].build().save_pretrained(tmp_path / "model")
    files = files_of(tmp_path / "model")
    stock = hub.add("owner/model", files)
    hub.add("owner/model", {"guidance.json": RECIPE})
    index = json.loads(files["model_index.json"]) | {"_class_name": ["my_pipeline", "MyPipeline"]}
    own = {**files, "model_index.json": json.dumps(index).encode(), "my_pipeline.py": PIPELINE_CODE}
    code = hub.add("owner/code", own)
    custom = hub.add("owner/pipeline", {"pipeline.py": PIPELINE_CODE})
    hub.add("owner/pipeline", {"pipeline.py": b"raise SystemExit('another commit')"})
    hub.add("owner/bomb", {**files, "unet/config.json": b'{"a":' * 50_000})
    hub.add("owner/pickles", {name.replace(".safetensors", ".bin"): data for name, data in files.items()})
    home = tmp_path / "home"

    online = session(
        hub,
        home,
        f"""
        from trimtab import GuidedPipeline, TrimtabError
        def load(*arguments, **options):
            try:
                pipe = GuidedPipeline.from_pretrained(*arguments, **options)
            except (TrimtabError, ValueError) as error:
                print(type(error).__name__, "|", " ".join(str(error).split()))
            else:
                print(type(pipe).__name__, {{name: one.scale for name, one in pipe.guidances.items()}})
        load("owner/model")
        load("owner/model", revision="{stock}")
        load("owner/none")
        load("owner/bomb")
        load("owner/pickles")
        load("owner/code")
        load("owner/code", trust_remote_code=True)
        load("owner/code", trust_remote_code=True, revision="main")
        load("owner/model", custom_pipeline="owner/code")
        load("owner/model", custom_pipeline="owner/code", trust_remote_code=True, revision="{stock}")
        load("owner/model", custom_pipeline="lpw_stable_diffusion", trust_remote_code=True, revision="{stock}")
        load("owner/code", trust_remote_code=True, revision="{code}")
        print("--")
        trusted = dict(trust_remote_code=True, revision="{stock}", custom_revision="{custom}")
        load("owner/model", custom_pipeline="owner/pipeline", **trusted)
        """,
    ).splitlines()
    assert online[0] == "StableDiffusionPipeline {'pag': 2.0}"
    assert online[1] == "StableDiffusionPipeline {}"
    assert online[2].startswith("SourceError | There is no folder 'owner/none', and the Hub shows no such repository")
    assert online[3].startswith("UnsupportedPipelineError | ") and "unet/config.json is no JSON" in online[3]
    assert online[4].startswith("UnsupportedPipelineError | owner/pickles: only weights in safetensors format")
    assert "trust_remote_code=True" in online[5]
    for line, argument in ((online[6], "revision=None"), (online[7], "revision='main'")):
        assert line.startswith("UntrustedCodeError | trust_remote_code=True runs code of 'owner/code'")
        assert argument in line and "40 hexadecimal digits" in line
    assert online[8].startswith("UntrustedCodeError | custom_pipeline='owner/code' runs code from the Hub")
    assert online[9].startswith("UntrustedCodeError | trust_remote_code=True runs code of 'owner/code'")
    assert "custom_revision=None" in online[9]
    assert online[10].startswith("UntrustedCodeError | custom_pipeline='lpw_stable_diffusion' is no file")
    for ran in (online[11 : online.index("--")], online[online.index("--") + 1 :]):
        assert ran[-1] == "MyPipeline {}" and set(ran[:-1]) == {"CODE RAN"}

    asked = len(hub.requests)
    offline = session(
        hub,
        home,
        f"""
        from trimtab import GuidedPipeline, SourceError
        for revision in (None, "main", "{stock}"):
            print(sorted(GuidedPipeline.from_pretrained("owner/model", revision=revision).guidances))
        try:
            GuidedPipeline.from_pretrained("owner/never")
        except SourceError as error:
            print(error)
        """,
        HF_HUB_OFFLINE="1",
    ).splitlines()
    assert offline[:3] == ["['pag']", "['pag']", "[]"]
    assert "is not in the cache, and HF_HUB_OFFLINE is set. Fetch it once while online." in offline[3]
    assert len(hub.requests) == asked
