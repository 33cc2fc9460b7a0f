"""`easycontrol` is the published code's result, at a fraction of its cost, on the stock transformer."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from benchmark import benchmark
from fingerprint import fingerprint
from fixtures import easycontrol_case as case
from fixtures.weights import noise
from PIL import Image
from safetensors.torch import load_file
from zoo import CASES, mask
from zoo import run as zoo_run

import trimtab
from trimtab.adapters.easycontrol.bank import Bank
from trimtab.adapters.easycontrol.checkpoint import projections_of, written
from trimtab.adapters.easycontrol.condition import positions
from trimtab.adapters.easycontrol.fill import fill
from trimtab.adapters.easycontrol.processors import StepProcessor
from trimtab.adapters.low_rank import LowRank
from trimtab.adapters.weights import save_weights
from trimtab.guidance.base import Guidance
from trimtab.guidance.errors import ParameterError, UnsupportedPipelineError, WeightsError
from trimtab.guidance.run import Step

EXPECTED = load_file(Path(__file__).parents[1] / "fixtures" / "easycontrol.safetensors")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    for name in (case.SPATIAL, case.OTHER_SPATIAL, case.SUBJECT):
        save_weights(folder / f"{name}.safetensors", case.lora(name))
    return folder


@pytest.fixture
def pipe() -> Any:
    built = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**case.SCHEDULER),
        vae=case.filled(diffusers.AutoencoderKL(**case.VAE), "vae"),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=case.filled(diffusers.FluxTransformer2DModel(**case.TRANSFORMER), "flux"),
    )
    built.set_progress_bar_config(disable=True)
    return trimtab.guide(built)


def run(pipe: Any, **override: Any) -> torch.Tensor:
    call: dict[str, Any] = {
        **case.prompt(),
        "height": case.HEIGHT,
        "width": case.BREADTH,
        "num_inference_steps": case.STEPS,
        "guidance_scale": case.GUIDANCE,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        **override,
    }
    return pipe(**call).images


def attach(pipe: Any, loras: Path, condition: str = case.SPATIAL, **override: Any) -> Any:
    parameters: dict[str, Any] = {
        "weights": str(loras),
        "weight_name": f"{condition}.safetensors",
        "image": case.picture(condition),
        "kind": "subject" if condition == case.SUBJECT else "spatial",
        "cond_size": case.COND_SIZE,
        "name": condition,
        **override,
    }
    return pipe.add_guidance("easycontrol", **parameters)


@pytest.mark.parametrize("reference", ["cached", "uncached"])
@pytest.mark.parametrize("name", case.CASES)
def test_it_equals_the_published_code(pipe: Any, loras: Path, name: str, reference: str) -> None:
    plain = run(pipe)
    for condition, weight in case.CASES[name]:
        attach(pipe, loras, condition, lora_weight=weight)
    controlled = run(pipe)
    assert (controlled - plain).abs().max() > 0.1
    torch.testing.assert_close(controlled, EXPECTED[f"{name}.{reference}"], rtol=0, atol=1e-5)


def test_the_order_in_which_they_are_attached_does_not_matter(pipe: Any, loras: Path) -> None:
    for condition, weight in reversed(case.CASES["subject_and_spatial"]):
        attach(pipe, loras, condition, lora_weight=weight)
    torch.testing.assert_close(run(pipe), EXPECTED["subject_and_spatial.cached"], rtol=0, atol=1e-5)


def test_without_strength_there_is_no_condition_and_it_fades_in_from_there(
    pipe: Any, loras: Path, fills: list[int]
) -> None:
    plain = run(pipe)
    control = attach(pipe, loras, strength=0.0)
    assert torch.equal(run(pipe), plain)
    assert not fills  # nothing was read either
    change = []
    for control.strength in (1e-6, 0.1, 0.5, 1.0):
        change.append((run(pipe) - plain).abs().max().item())
    assert change[0] < 1e-5
    assert change == sorted(change)
    control.strength, control.lora_weight = 1.0, 0.0
    assert (run(pipe) - plain).abs().max() > 0.1  # a LoRA without weight is still a condition


def test_outside_its_window_it_does_nothing(pipe: Any, loras: Path) -> None:
    plain = run(pipe)
    control = attach(pipe, loras, start=1.0)
    assert torch.equal(run(pipe), plain)
    control.start, control.stop = 0.0, 1 / 3
    seen: list[torch.Tensor] = []

    def keep(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(tensors["latents"])
        return tensors

    windowed = run(pipe, callback_on_step_end=keep)
    control.stop = 1.0
    always: list[torch.Tensor] = seen.copy()
    seen.clear()
    assert not torch.equal(run(pipe, callback_on_step_end=keep), windowed)
    assert torch.equal(seen[0], always[0])


def test_two_conditions_may_act_at_different_times(pipe: Any, loras: Path) -> None:
    first = attach(pipe, loras, case.SUBJECT, stop=0.5)
    attach(pipe, loras, case.SPATIAL, start=0.5)
    both = run(pipe)
    first.stop = 0.0
    assert not torch.equal(run(pipe), both)


def test_a_batch_has_a_condition_for_each_prompt(pipe: Any, loras: Path) -> None:
    pictures = [case.picture(case.SPATIAL), case.picture(case.OTHER_SPATIAL)]
    prompts = case.prompt(batch=2)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    attach(pipe, loras, image=pictures)
    together = run(pipe, **prompts, generator=generators)
    pipe.clear_guidance()
    for row, seed in enumerate((1, 2)):
        attach(pipe, loras, image=pictures[row])
        one = {name: tensor[row : row + 1] for name, tensor in prompts.items()}
        alone = run(pipe, **one, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
        pipe.clear_guidance()


@pytest.mark.parametrize("conditions", [(case.SPATIAL,), (case.SUBJECT, case.SPATIAL)])
def test_an_image_depends_on_its_own_generator_alone(pipe: Any, loras: Path, conditions: Sequence[str]) -> None:
    for condition in conditions:
        attach(pipe, loras, condition)
    prompts = case.prompt(batch=2)
    together = run(pipe, **prompts, generator=generators(1, 2))
    other = run(pipe, **prompts, generator=generators(3, 2))
    torch.testing.assert_close(other[1], together[1], rtol=0, atol=1e-5)
    assert not torch.allclose(other[0], together[0], atol=1e-2)
    for row, seed in enumerate((1, 2)):
        one = {name: tensor[row : row + 1] for name, tensor in prompts.items()}
        torch.testing.assert_close(together[row], run(pipe, **one, generator=generators(seed))[0], rtol=0, atol=1e-5)


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each fill that was made."""
    made: list[int] = []

    def counted(*args: Any) -> Any:
        made.append(len(args[-1]))
        return fill(*args)

    monkeypatch.setattr("trimtab.adapters.easycontrol.flux.fill", counted)
    return made


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def with_lora(folder: Path) -> Any:
    """A tiny Flux with text encoders, and a LoRA for it in the folder."""
    pipe = trimtab.guide(CASES["flux"].build())
    loras: dict[str, dict[str, LowRank]] = {}
    for layer, projection, width_in, width_out in projections_of(pipe.transformer):
        down, up = noise(f"down.{layer}.{projection}", 4, width_in), noise(f"up.{layer}.{projection}", width_out, 4)
        loras.setdefault(layer, {})[projection] = LowRank(down / 4, up / 4)
    save_weights(folder / "lora.safetensors", written(loras))
    return pipe


def test_each_image_of_a_prompt_may_have_a_condition_of_its_own(tmp_path: Path) -> None:
    """Two prompts with two images each, beside another condition with one picture for each prompt."""
    pipe, flux, prompts = with_lora(tmp_path), CASES["flux"], ["a red fox", "a grey whale"]
    pictures = [Image.new("RGB", (32, 32), (60 * number, 90, 200)) for number in range(4)]
    others = [case.picture(case.OTHER_SPATIAL), case.picture(case.SPATIAL)]

    def made(first: Any, second: Any, **call: Any) -> torch.Tensor:
        pipe.clear_guidance()
        for name, image in (("first", first), ("second", second)):
            attach(pipe, tmp_path, weight_name="lora.safetensors", image=image, name=name)
        return zoo_run(pipe, flux, **call)

    together = made(pictures, others, prompt=prompts, num_images_per_prompt=2, generator=generators(0, 1, 2, 3))
    for number in range(4):
        call = {"prompt": prompts[number // 2], "generator": generators(number)}
        alone = made(pictures[number], others[number // 2], **call)
        torch.testing.assert_close(together[number : number + 1], alone, rtol=0, atol=1e-5)
    call = {"prompt": prompts, "num_images_per_prompt": 2}
    one, other = (made([*pictures[:3], last], others, **call) for last in (pictures[3], pictures[0]))
    torch.testing.assert_close(one[:3], other[:3], rtol=0, atol=1e-5)
    assert not torch.allclose(one[3], other[3], atol=1e-3)


def test_one_fill_serves_all_images_of_a_prompt_and_all_steps(tmp_path: Path, fills: list[int]) -> None:
    pipe, flux = with_lora(tmp_path), CASES["flux"]
    pictures = [case.picture(case.SPATIAL), case.picture(case.OTHER_SPATIAL)]
    attach(pipe, tmp_path, weight_name="lora.safetensors")
    zoo_run(pipe, flux, prompt=["a red fox", "a grey whale", "a red fox"])
    assert fills == [2]  # one for each distinct prompt
    pipe.clear_guidance()
    fills.clear()
    attach(pipe, tmp_path, weight_name="lora.safetensors", image=pictures)
    prompts = ["a red fox", "a grey whale"]
    zoo_run(pipe, flux, prompt=prompts, num_images_per_prompt=2)
    assert fills == [2]
    fills.clear()
    together = zoo_run(pipe, flux, prompt=prompts, num_images_per_prompt=2, generator=generators(0, 1, 2, 3))
    assert fills == [4]  # each image's generator draws the condition's latents for it
    pipe.clear_guidance()
    for image in range(4):
        attach(pipe, tmp_path, weight_name="lora.safetensors", image=pictures[image // 2])
        alone = zoo_run(pipe, flux, prompt=prompts[image // 2], generator=generators(image))
        torch.testing.assert_close(together[image : image + 1], alone, rtol=0, atol=1e-5)
        pipe.clear_guidance()


def test_true_cfg_fills_once_for_each_prompt_and_controls_both(pipe: Any, loras: Path, fills: list[int]) -> None:
    prompt = case.prompt()
    negative = {name: -tensor for name, tensor in prompt.items()}
    attach(pipe, loras)
    cond, uncond = (run(pipe, **one, num_inference_steps=1) for one in (prompt, negative))
    fills.clear()
    both = run(
        pipe, **{f"negative_{name}": value for name, value in negative.items()}, true_cfg_scale=3.0,
        num_inference_steps=1,
    )  # fmt: skip
    assert fills == [1, 1]
    torch.testing.assert_close(both, uncond + 3.0 * (cond - uncond), rtol=0, atol=1e-4)


@pytest.mark.parametrize("condition", [case.SPATIAL, case.SUBJECT])
@pytest.mark.parametrize("size", [(24, 24), (16, 40), (48, 32)])
def test_any_aspect_ratio(pipe: Any, loras: Path, condition: str, size: tuple[int, int]) -> None:
    attach(pipe, loras, condition)
    assert run(pipe, height=size[0], width=size[1]).shape == (1, size[0] * size[1] // 16, 16)


def test_positions_lie_over_the_image_or_below_it_in_fractions_of_a_token() -> None:
    image = torch.tensor([[0.0, y, x] for y in range(45) for x in range(62)], dtype=torch.bfloat16)
    spatial = positions("spatial", 32, image).unflatten(0, (32, 32))
    assert spatial.dtype == torch.float32
    torch.testing.assert_close(spatial[1, 0], torch.tensor([0.0, 45 / 32, 0.0]), rtol=0, atol=0)
    torch.testing.assert_close(spatial[0, 31], torch.tensor([0.0, 0.0, 31 * 62 / 32]), rtol=0, atol=0)
    assert positions("subject", 32, image)[-1].tolist() == [0.0, 95.0, 31.0]
    given = torch.tensor([[1.0, y, x] for y in range(90) for x in range(90)], dtype=torch.bfloat16)
    assert torch.equal(positions("spatial", 32, torch.cat([image, given])).unflatten(0, (32, 32)), spatial)


# -- siblings ----------------------------------------------------------------------------------------------------------
def sibling(pipe: Any, name: str) -> Any:
    built = getattr(diffusers, name)(**pipe.components)
    built.set_progress_bar_config(disable=True)
    return trimtab.guide(built)


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxInpaintPipeline"])
def test_it_acts_in_the_siblings_as_well(pipe: Any, loras: Path, name: str) -> None:
    other = sibling(pipe, name)
    size = (case.BREADTH, case.HEIGHT)
    call: dict[str, Any] = {"image": case.picture(case.OTHER_SPATIAL).resize(size), "strength": 0.7}
    if "Inpaint" in name:
        call["mask_image"] = mask(case.HEIGHT).resize(size)
    plain = run(other, **call)
    attach(other, loras)
    assert (run(other, **call) - plain).abs().max() > 1e-2
    other.clear_guidance()
    assert torch.equal(run(other, **call), plain)


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxInpaintPipeline"])
def test_in_the_siblings_each_image_of_a_batch_has_its_own_condition(tmp_path: Path, name: str) -> None:
    """An image each, since the stock pipelines give the images of a batch that share one other noises than alone."""
    pipe, prompts = sibling(with_lora(tmp_path), name), ["a red fox", "a grey whale"]
    conditions = [case.picture(case.SPATIAL), case.picture(case.OTHER_SPATIAL)]
    images = [picture.resize((32, 32)) for picture in reversed(conditions)]
    masked = {"mask_image": mask(32)} if "Inpaint" in name else {}

    def made(condition: Any, *seeds: int, **call: Any) -> torch.Tensor:
        pipe.clear_guidance()
        attach(pipe, tmp_path, weight_name="lora.safetensors", image=condition)
        return zoo_run(pipe, CASES["flux"], generator=generators(*seeds), strength=0.7, **masked, **call)

    together = made(conditions, 0, 1, prompt=prompts, image=images)
    for row in range(2):
        alone = made(conditions[row], row, prompt=prompts[row], image=images[row])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


# -- beside other things -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_compiled_and_with_fused_projections_it_is_the_same(
    pipe: Any, loras: Path, compiled: bool, fused: bool
) -> None:
    expected = EXPECTED["one_spatial.cached"]
    if fused:
        pipe.transformer.fuse_qkv_projections()
    if compiled:
        pipe.transformer.compile(backend="eager", fullgraph=True)
    attach(pipe, loras)
    torch.testing.assert_close(run(pipe), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("compile", ["compile", "compile_repeated_blocks"])
def test_compiled_in_one_graph_with_strengths_and_windows_it_is_the_same(
    pipe: Any, loras: Path, compile: str, offload: bool
) -> None:
    attach(pipe, loras, strength=0.5, stop=0.7, offload_cache=offload)
    attach(pipe, loras, case.SUBJECT, start=0.3, offload_cache=offload)
    expected = run(pipe)
    getattr(pipe.transformer, compile)(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(pipe), expected, rtol=0, atol=1e-5)


def test_with_a_step_cache_the_condition_is_filled_whole(pipe: Any, loras: Path) -> None:
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    attach(pipe, loras)
    torch.testing.assert_close(run(pipe), EXPECTED["one_spatial.cached"], rtol=0, atol=1e-5)


def test_with_group_offloading_it_is_the_same(pipe: Any, loras: Path) -> None:
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    attach(pipe, loras)
    torch.testing.assert_close(run(pipe), EXPECTED["one_spatial.cached"], rtol=0, atol=1e-5)


def test_a_cache_in_main_memory_gives_the_same(pipe: Any, loras: Path) -> None:
    attach(pipe, loras, offload_cache=True)
    torch.testing.assert_close(run(pipe), EXPECTED["one_spatial.cached"], rtol=0, atol=1e-5)


def test_the_cache_is_released_with_the_run(pipe: Any, loras: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    add = Bank.add

    def watched(self: Bank, keys: torch.Tensor, layers: Any) -> None:
        kept.extend(weakref.ref(part) for states in layers.values() for part in states)
        add(self, keys, layers)

    monkeypatch.setattr(Bank, "add", watched)
    attach(pipe, loras)
    run(pipe)
    gc.collect()
    assert len(kept) == 8
    assert all(one() is None for one in kept)


def test_after_a_run_and_after_a_failure_the_pipeline_is_as_it_was(pipe: Any, loras: Path) -> None:
    plain = run(pipe)
    before = fingerprint(pipe.transformer)
    attach(pipe, loras)
    run(pipe)
    assert fingerprint(pipe.transformer) == before

    def fail(*args: Any) -> Any:
        raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="broken on purpose"):
        run(pipe, callback_on_step_end=fail)
    assert fingerprint(pipe.transformer) == before
    pipe.clear_guidance()
    assert torch.equal(run(pipe), plain)


# -- composition -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", ["auto", "batched", "sequential"])
def test_with_pag_the_perturbed_tokens_still_see_the_condition(
    pipe: Any, loras: Path, fills: list[int], rows: str
) -> None:
    attach(pipe, loras)
    controlled = run(pipe)
    pipe.add_guidance("pag", scale=2.0, layers="blocks.1")
    pipe.guidance_rows = rows
    fills.clear()
    both = run(pipe, num_inference_steps=1)
    assert fills == [1]  # the perturbed branch has the same prompt
    pipe.remove_guidance("pag")
    attention = pipe.transformer.transformer_blocks[1].attn, pipe.transformer.single_transformer_blocks[1].attn
    assert all(type(one.processor).__name__ == "FluxAttnProcessor" for one in attention)
    expected = perturbed_by_hand(pipe, scale=2.0)
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(both, controlled, atol=1e-2)


def perturbed_by_hand(pipe: Any, scale: float) -> torch.Tensor:
    """One step with `v + s (v - v')`, where v' comes from a transformer whose image tokens see only themselves, the
    text and the condition in the second block of each kind."""
    plain = run(pipe, num_inference_steps=1)
    stock = StepProcessor.__call__

    def call(self: Any, attn: Any, *args: Any, fills: Any = None, **kwargs: Any) -> Any:
        blocks = pipe.transformer.transformer_blocks[1], pipe.transformer.single_transformer_blocks[1]
        if fills is None or attn not in [block.attn for block in blocks]:
            return stock(self, attn, *args, fills=fills, **kwargs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trimtab.adapters.easycontrol.processors.dispatch_attention_fn", dense)
            return stock(self, attn, *args, fills=fills, **kwargs)

    call.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]

    def dense(query: Any, key: Any, value: Any, attn_mask: Any, **options: Any) -> torch.Tensor:
        text, length = 7, query.shape[1]
        allowed = torch.ones(length, key.shape[1], dtype=torch.bool)
        allowed[text:, text:length] = torch.eye(length - text, dtype=torch.bool)
        logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        weights = logits.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepProcessor, "__call__", call)
        perturbed = run(pipe, num_inference_steps=1)
    return plain + scale * (plain - perturbed)


@dataclass
class Towards(Guidance):
    """A loss that pulls the clean estimate to 0, through the denoiser."""

    differentiate: ClassVar[str] = "x_t"

    def loss(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        return 0.1 * x0.square().flatten(1).sum(dim=1)


def test_a_gradient_goes_through_the_step_and_not_through_the_fill(pipe: Any, loras: Path, fills: list[int]) -> None:
    attach(pipe, loras)
    controlled = run(pipe)
    pipe.add_guidance(Towards(), name="towards")
    fills.clear()
    both = run(pipe)
    assert fills == [1]
    assert both.norm() < controlled.norm()
    pipe.remove_guidance(case.SPATIAL)
    assert not torch.allclose(run(pipe), both, atol=1e-2)


def test_with_a_classifier_both_act(pipe: Any, loras: Path) -> None:
    attach(pipe, loras)
    controlled = run(pipe)
    judge = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    classifier = pipe.add_guidance("classifier", classifier=judge, target=1, scale=50.0)
    steered = run(pipe)
    assert not torch.allclose(steered, controlled, atol=1e-4)
    classifier.scale = 0.0
    assert torch.equal(run(pipe), controlled)
    classifier.scale = 50.0
    pipe.remove_guidance(case.SPATIAL)
    assert not torch.allclose(run(pipe), steered, atol=1e-2)


# -- refusals ----------------------------------------------------------------------------------------------------------
def damaged(loras: Path, target: Path, change: Any) -> Path:
    tensors = load_file(loras / f"{case.SPATIAL}.safetensors")
    change(tensors)
    return save_weights(target / "damaged.safetensors", tensors)


def wider(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = torch.cat([tensor, tensor], dim=int("down" in name))


def other_rank(tensors: dict[str, torch.Tensor]) -> None:
    name = "transformer_blocks.1.attn.processor.k_loras.0.up.weight"
    tensors[name] = tensors[name][:, :2]


def without_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["single_transformer_blocks.1.attn.processor.v_loras.0.up.weight"]


def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["transformer_blocks.0.attn.processor.proj_loras.0.down.weight"][0, 0] = float("nan")


def of_a_deeper_model(tensors: dict[str, torch.Tensor]) -> None:
    tensors["transformer_blocks.7.attn.processor.q_loras.0.up.weight"] = torch.zeros(32, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider, r"down\.weight has shape \(4, 64\), but FluxTransformer2DModel with rank 4 needs \(4, 32\)"),
        (other_rank, r"1\.attn\.processor\.k_loras\.0\.up\.weight has shape \(32, 2\), .* needs \(32, 4\)"),
        (without_one, r"lacks single_transformer_blocks\.1\.attn\.processor\.v_loras\.0\.up\.weight"),
        (with_nan, r"proj_loras\.0\.down\.weight of shape \(4, 32\) holds numbers that are not finite"),
        (of_a_deeper_model, r"transformer_blocks\.7\.attn\.processor\.q_loras\.0 .* has no place"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_clear_error(
    pipe: Any, loras: Path, tmp_path: Path, change: Any, message: str
) -> None:
    before = fingerprint(pipe.transformer)
    path = damaged(loras, tmp_path, change)
    with pytest.raises(WeightsError, match=rf"damaged\.safetensors.*{message}"):
        attach(pipe, tmp_path, weight_name=path.name)
    assert not pipe.guidances
    assert fingerprint(pipe.transformer) == before


def test_a_truncated_file_is_refused(pipe: Any, loras: Path, tmp_path: Path) -> None:
    whole = (loras / f"{case.SPATIAL}.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"short\.safetensors"):
        attach(pipe, tmp_path, weight_name="short.safetensors")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weights": None}, "weights is missing"),
        ({"image": None}, "image is missing"),
        ({"image": 3}, "image=3 is an int, not Image or str"),
        ({"image": "nowhere.png"}, "image='nowhere.png' cannot be read"),
        ({"image": []}, "image is an empty list"),
        ({"kind": "depth"}, "kind='depth'"),
        ({"cond_size": 18}, "cond_size=18; allowed: a multiple of 4 pixels"),
        ({"strength": -1.0}, "strength=-1.0"),
    ],
)
def test_a_wrong_parameter_is_refused_when_it_is_attached(
    pipe: Any, loras: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        attach(pipe, loras, **wrong)


def test_more_images_than_prompts_are_refused_before_any_denoiser_call(pipe: Any, loras: Path) -> None:
    attach(pipe, loras, image=[case.picture(case.SPATIAL)] * 3)
    with pytest.raises(ParameterError, match="3 images for 1 prompts; give one, or one for each prompt or image"):
        run(pipe)


def test_a_denoiser_without_an_adapter_is_refused(loras: Path) -> None:
    with pytest.raises(UnsupportedPipelineError, match="UNet2DConditionModel; it can be to: FluxTransformer2DModel"):
        attach(trimtab.guide(CASES["sd15"].build()), loras)


# -- cost --------------------------------------------------------------------------------------------------------------
def test_a_step_on_flux_dev_costs_little_more_than_one_without_a_condition() -> None:
    (one, two), fill = benchmark("flops").easycontrol()
    assert 1.0 < one <= 1.05
    assert one < two <= 1.10
    assert 0.0 < fill <= 0.19


def test_it_asks_for_no_further_evaluation(pipe: Any, loras: Path) -> None:
    attach(pipe, loras)
    plan = pipe.explain_guidance(num_inference_steps=case.STEPS)
    run(pipe)
    assert pipe.last_guided_run.evaluations == plan.evaluations == case.STEPS
    assert pipe.last_guided_run.forward_calls == plan.calls == case.STEPS
