"""`joint` is the published code's result on both sides, on the stock UNet and the stock pipeline."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
import torch
from benchmark import benchmark
from fingerprint import fingerprint
from fixtures import unicon_case as case
from fixtures.weights import noise
from PIL import Image
from safetensors.torch import load_file
from zoo import CASES
from zoo import run as zoo_run

import trimtab
from trimtab.adapters.low_rank import LowRank
from trimtab.adapters.unicon import processors
from trimtab.adapters.unicon.checkpoint import PROJECTIONS, Block, blocks_of, save
from trimtab.adapters.unicon.inputs import Inputs, _on_own
from trimtab.adapters.unicon.partner import Partner
from trimtab.adapters.weights import save_weights
from trimtab.cli import main
from trimtab.guidance.errors import ConflictError, ParameterError, SourceError, UnsupportedPipelineError, WeightsError
from trimtab.guidance.plugins.joint import Joint
from trimtab.pipelines.denoiser import Denoiser

EXPECTED = load_file(Path(__file__).parents[1] / "fixtures" / "unicon.safetensors")


def build(scheduler: str = "DDIMScheduler", xl: bool = False, velocity: bool = False) -> Any:
    words = case.Words()
    if xl:
        return guided(
            diffusers.StableDiffusionXLPipeline(
                unet=case.filled(diffusers.UNet2DConditionModel(**case.UNET_XL), "unet"),
                vae=case.filled(diffusers.AutoencoderKL(**case.VAE), "vae"),
                text_encoder=None,
                tokenizer=None,
                text_encoder_2=case.EmbeddingsXL(words),
                tokenizer_2=words,
                scheduler=case.scheduler(diffusers, scheduler, velocity),
            )
        )
    return guided(
        diffusers.StableDiffusionPipeline(
            unet=case.filled(diffusers.UNet2DConditionModel(**case.UNET), "unet"),
            vae=case.filled(diffusers.AutoencoderKL(**case.VAE), "vae"),
            text_encoder=case.Embeddings(words),
            tokenizer=words,
            scheduler=case.scheduler(diffusers, scheduler, velocity),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def guided(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return trimtab.guide(pipe)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("unicon"), case.UNET)


@pytest.fixture(scope="module")
def models_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("unicon_xl"), case.UNET_XL)


def written(folder: Path, unet: dict[str, Any]) -> Path:
    """The published layout, with safetensors in place of model.pth."""
    widths = case.blocks_of(diffusers.UNet2DConditionModel(**unet))
    for name, (_, own) in case.MODELS.items():
        save_weights(folder / name / "model.safetensors", case.posts(name, widths))
        for kind in ("xy_lora", "yx_lora", "y_lora") if own else ("xy_lora", "yx_lora"):
            save_weights(folder / name / kind / "pytorch_lora_weights.safetensors", case.lora(name, kind, widths))
    return folder


def run(pipe: Any, **override: Any) -> torch.Tensor:
    call: dict[str, Any] = {
        "prompt": case.PROMPT,
        "negative_prompt": case.NEGATIVE,
        "latents": case.latents("noise"),
        "num_inference_steps": case.STEPS,
        "guidance_scale": case.GUIDANCE,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        **override,
    }
    return pipe(**call).images


def attach(pipe: Any, models: Path, model: str = "depth", **override: Any) -> Any:
    parameters: dict[str, Any] = {
        "weights": str(models),
        "model": model,
        "image": case.latents("x" if override.get("mode") == "estimate" else model),
        "name": model,
        **override,
    }
    return pipe.add_guidance("joint", **parameters)


@pytest.mark.parametrize("name", case.RUNS)
def test_both_sides_equal_the_published_code(models: Path, models_xl: Path, name: str) -> None:
    described = case.RUNS[name]
    pipe = build(described.scheduler, described.xl, described.velocity)
    partners = []
    for model, weight in zip(described.models, described.weights, strict=True):
        options: dict[str, Any] = {"mode": described.mode, "joint_scale": weight, "signal_scale": described.signal}
        if described.mask == "x":
            options.update(own_mask=case.mask(), own_image=case.latents("x"))
        if described.mask == "y":
            options.update(mask=case.mask())
        folder = models_xl if described.xl else models
        partners.append(attach(pipe, folder, model, noise_strength=case.COARSE, **options))
    own = run(pipe)
    sides = [own, *(partner.partner for partner in partners)]
    if described.mode == "estimate":
        sides.reverse()
    expected = EXPECTED[name]
    torch.testing.assert_close(torch.cat(sides), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_at_scale_0_a_given_partner_costs_nothing_and_changes_nothing(models: Path) -> None:
    pipe = build()
    plain = run(pipe)
    joint = attach(pipe, models, joint_scale=0.0)
    assert torch.equal(run(pipe), plain)
    joint.joint_scale = 1.0
    assert not torch.allclose(run(pipe), plain, atol=1e-2)
    joint.start = 1.0
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize(
    "scheduler",
    ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
     "LMSDiscreteScheduler", "EulerDiscreteScheduler"],
)  # fmt: skip
def test_at_scale_0_a_partner_that_is_made_is_what_it_is_alone(models: Path, scheduler: str) -> None:
    pipe = build(scheduler)
    plain = run(pipe)
    joint = attach(pipe, models, "id", mode="joint", joint_scale=0.0)
    assert torch.equal(run(pipe), plain)
    noise = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
    pipe.clear_guidance()
    close(joint.partner, run(pipe, latents=noise))  # `id` has no LoRAs of the partner's own


def test_a_window_holds_for_the_joint_attention_while_the_partner_goes_on(models: Path) -> None:
    pipe = build()
    joint = attach(pipe, models, mode="joint")
    whole, both = run(pipe), joint.partner
    joint.stop = 0.5
    assert not torch.allclose(run(pipe), whole, atol=1e-2)
    assert not torch.allclose(joint.partner, both, atol=1e-2)
    assert torch.isfinite(joint.partner).all()


def test_a_given_partner_that_is_never_denoised_stays_what_was_given(models: Path) -> None:
    pipe = build()
    joint = attach(pipe, models, stop=0.5)
    run(pipe)
    assert torch.equal(joint.partner, case.latents("depth"))


def test_after_a_run_and_after_a_failure_the_pipeline_is_as_it_was(models: Path) -> None:
    pipe = build()
    plain = run(pipe)
    before = fingerprint(pipe.unet), fingerprint(pipe.scheduler)
    attach(pipe, models, mode="joint")
    run(pipe)
    assert fingerprint(pipe.unet) == before[0]

    def fail(*args: Any) -> Any:
        raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="broken on purpose"):
        run(pipe, callback_on_step_end=fail)
    assert fingerprint(pipe.unet) == before[0]
    pipe.clear_guidance()
    assert torch.equal(run(pipe), plain)


def test_an_ancestral_scheduler_is_reproducible_by_seed(models: Path) -> None:
    pipe = build("EulerAncestralDiscreteScheduler")
    joint = attach(pipe, models, mode="joint")
    first, partner = run(pipe), joint.partner
    torch.manual_seed(123)  # the global generator must not matter
    assert torch.equal(run(pipe), first)
    assert torch.equal(joint.partner, partner)
    assert not torch.allclose(run(pipe, generator=torch.Generator().manual_seed(1)), first, atol=1e-2)


def test_a_batch_has_a_partner_for_each_image(models: Path) -> None:
    pipe = build()
    given = torch.cat([case.latents("depth"), case.latents("pose")])
    own = torch.cat([case.latents("noise"), case.latents("other noise")])
    joint = attach(pipe, models, image=given)

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = run(pipe, prompt=["a fox", "a whale"], latents=own, generator=generators(1, 2), negative_prompt=None)
    for index, prompt in enumerate(("a fox", "a whale")):
        joint.image = given[index : index + 1]
        alone = run(
            pipe, prompt=prompt, latents=own[index : index + 1], generator=generators(1 + index), negative_prompt=None
        )
        close(together[index : index + 1], alone)


@pytest.mark.parametrize("mode", ["condition", "joint"])
@pytest.mark.parametrize("pictures", [2, 4], ids=["one for each prompt", "one for each image"])
def test_each_image_of_a_prompt_has_its_own_partner(mode: str, pictures: int, models: Path) -> None:
    pipe = build()
    given, own = (torch.cat([noise(f"{side}.{i}", 1, 4, 8, 8) for i in range(4)]) for side in ("given", "own"))
    joint = attach(pipe, models, image=given[:pictures], mode=mode, signal_scale=0.5)
    prompts, negatives = ["a fox", "a whale"], ["blurry", "dark"]

    def made(prompt: Any, negative: Any, latents: torch.Tensor, *seeds: int, **call: Any) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        image = run(pipe, prompt=prompt, negative_prompt=negative, latents=latents, generator=generators, **call)
        return torch.cat([image, joint.partner], dim=1)

    together = made(prompts, negatives, own, 0, 1, 2, 3, num_images_per_prompt=2)
    for number in range(4):
        joint.image = given[number * pictures // 4][None]
        alone = made(prompts[number // 2], negatives[number // 2], own[number : number + 1], number)
        close(together[number : number + 1], alone)


@pytest.mark.parametrize("mode", ["condition", "estimate", "joint", "coarse"])
@pytest.mark.parametrize("sides", ["own", "partner", "both"])
def test_a_mask_keeps_a_part_of_either_side_in_every_mode(mode: str, sides: str, models: Path) -> None:
    pipe = build()
    given, kept = case.latents("x" if mode == "estimate" else "depth"), case.latents("kept")
    options: dict[str, Any] = {"image": given}
    if sides != "partner":
        options.update(own_mask=case.mask(), own_image=kept)
    if sides != "own":
        options.update(mask=case.mask())
    joint = attach(pipe, models, mode=mode, **options)
    own, (made, right) = run(pipe), (slice(0, 4), slice(4, 8))  # white, to be made, on the left
    for side, image, masked in ((own, kept, sides != "partner"), (joint.partner, given, sides != "own")):
        assert torch.equal(side[..., right], image[..., right]) == masked
        assert not torch.allclose(side[..., made], image[..., made], atol=1e-3)


def test_each_side_has_its_own_prompt(models: Path) -> None:
    pipe = build()
    joint = attach(pipe, models, mode="joint")
    same = run(pipe)
    joint.prompt = case.PROMPT
    assert torch.equal(run(pipe), same)
    joint.trigger = "depth_map, "
    assert torch.equal(run(pipe), same)
    joint.trigger = ""
    assert not torch.allclose(run(pipe), same, atol=1e-3)
    joint.trigger, joint.negative_prompt = None, "sharp"
    assert not torch.allclose(run(pipe), same, atol=1e-3)


def test_embeddings_in_place_of_a_prompt_are_those_of_both_sides(models: Path) -> None:
    pipe = build()
    joint = attach(pipe, models, mode="joint")
    expected = torch.cat([run(pipe), joint.partner])
    negative = {"negative_prompt": None, "negative_prompt_embeds": case.embedding(case.NEGATIVE)}
    close(torch.cat([run(pipe, **negative), joint.partner]), expected)
    embeddings = {**negative, "prompt": None, "prompt_embeds": case.embedding(case.PROMPT)}
    with pytest.raises(ParameterError, match=r"the trigger word 'depth_map, ' cannot be put; give prompt="):
        run(pipe, **embeddings)
    joint.prompt = case.PROMPT
    close(torch.cat([run(pipe, **embeddings), joint.partner]), expected)
    longer = {name: value if value is None else value.repeat(1, 2, 1) for name, value in embeddings.items()}
    tokens = f"have {case.TOKENS} and {2 * case.TOKENS} tokens"
    with pytest.raises(ParameterError, match=rf"joint: the embeddings of both sides' prompts {tokens}"):
        run(pipe, **longer)
    joint.prompt, joint.trigger = None, ""
    assert run(pipe, **longer).isfinite().all()
    joint.negative_prompt = case.NEGATIVE  # without a word of the prompt
    assert run(pipe, **embeddings).isfinite().all()


def test_a_partner_that_is_made_is_rescaled_as_the_pipelines_own_side_is(models: Path) -> None:
    pipe = build(velocity=True)
    joint = attach(pipe, models, "id", mode="joint", joint_scale=0.0)
    plain = run(pipe, guidance_rescale=0.7)
    noised = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
    pipe.clear_guidance()
    close(joint.partner, run(pipe, latents=noised, guidance_rescale=0.7))
    assert not torch.allclose(joint.partner, run(pipe, latents=noised), atol=1e-2)


def test_of_a_given_partner_something_is_seen_in_a_single_step(models: Path) -> None:
    pipe = build()
    joint = attach(pipe, models)
    one = run(pipe, num_inference_steps=1)
    joint.image = case.latents("pose")
    assert not torch.allclose(run(pipe, num_inference_steps=1), one, atol=1e-3)


def test_the_partner_comes_as_a_picture(models: Path) -> None:
    pipe = build()
    picture = case.mask().resize((20, 30))
    joint = attach(pipe, models, image=picture, mode="coarse")
    assert joint.partner is None
    made = pipe(prompt=case.PROMPT, num_inference_steps=2, height=16, width=16).images[0]
    assert made.size == joint.partner[0].size == (16, 16)


@pytest.mark.parametrize("mode, rows_of_a_step", [("condition", [4, 1]), ("estimate", [4, 1]), ("joint", [6])])
def test_signal_guidance_costs_one_row_an_image_and_one_of_a_partner_that_is_made(
    mode: str, rows_of_a_step: list[int], models: Path
) -> None:
    pipe = build()
    attach(pipe, models, signal_scale=1.0, mode=mode)
    rows: list[int] = []
    pipe.unet.conv_in.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    plan = pipe.explain_guidance(num_inference_steps=case.STEPS, guidance_scale=case.GUIDANCE)
    run(pipe)
    assert rows == [*rows_of_a_step * (case.STEPS - 1), 6]  # in the last step any partner takes one
    assert plan.evaluations == pipe.last_guided_run.evaluations == sum(rows)


@pytest.fixture
def rows_of_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each UNet call, as its first layer sees them."""
    rows: list[int] = []
    stock = diffusers.UNet2DConditionModel.forward

    def forward(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        handle = self.conv_in.register_forward_hook(lambda module, given, output: rows.append(len(output)))
        try:
            return stock(self, sample, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", functools.wraps(stock)(forward))
    return rows


@pytest.mark.parametrize("pag", [False, True])
@pytest.mark.parametrize(
    "attached",
    [
        [{"mode": "joint", "stop": 0.5}],
        [{"mode": "joint", "joint_scale": 0.0}],
        [{"mode": "coarse", "start": 0.5, "signal_scale": 1.0}],
        [{"mode": "joint", "stop": 0.5}, {"mode": "coarse", "model": "pose", "start": 0.5}],
        [{"mode": "condition", "stop": 0.5}, {"mode": "joint", "model": "pose", "joint_scale": 0.0}],
    ],
    ids=str,
)
def test_what_a_partner_costs_outside_of_its_window_is_in_the_plan(
    attached: list[dict[str, Any]], pag: bool, models: Path, rows_of_calls: list[int]
) -> None:
    pipe = build()
    for options in attached:
        attach(pipe, models, **options)
    if pag:
        pipe.add_guidance("pag", scale=2.0)
        pipe.guidance_rows = "batched"
    plan = pipe.explain_guidance(num_inference_steps=case.STEPS, guidance_scale=case.GUIDANCE)
    run(pipe)
    assert plan.evaluations == sum(rows_of_calls) == pipe.last_guided_run.evaluations
    assert plan.calls == len(rows_of_calls) == pipe.last_guided_run.forward_calls


@pytest.mark.parametrize("signal, rows_of_a_step", [((1.0, 0.5), [9]), ((1.0, 0.0), [6, 1]), ((0.0, 1.0), [9])])
def test_partners_share_what_is_predicted_without_them(
    signal: tuple[float, float], rows_of_a_step: list[int], models: Path, rows_of_calls: list[int]
) -> None:
    pipe = build()
    held = attach(pipe, models, mode="condition", signal_scale=signal[0])
    moving = attach(pipe, models, "pose", mode="joint", signal_scale=signal[1])
    plan = pipe.explain_guidance(num_inference_steps=case.STEPS, guidance_scale=case.GUIDANCE)
    shared = torch.cat([run(pipe), held.partner, moving.partner])
    assert rows_of_calls == [*rows_of_a_step * (case.STEPS - 1), 9]
    assert plan.evaluations == sum(rows_of_calls) == pipe.last_guided_run.evaluations
    with pytest.MonkeyPatch.context() as patch:  # each its own
        patch.setattr(Joint, "separate", by_itself)
        close(shared, torch.cat([run(pipe), held.partner, moving.partner]))


def by_itself(joint: Joint, step: Any) -> Any:
    return step.state.separate if joint.moves or step.index + 1 == step.count else step.state.alone


def test_a_call_of_which_no_row_is_known_is_refused_and_not_taken_for_one_without_partner(models: Path) -> None:
    pipe = build()
    attach(pipe, models)
    unknown = Denoiser.roles
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Denoiser, "roles", lambda *args: None)
        with pytest.raises(trimtab.GuidanceRuntimeError, match="which rows of the UNet's call carry the prompt"):
            run(pipe)
    assert Denoiser.roles is unknown


@pytest.mark.parametrize("rows", ["auto", "batched", "sequential"])
def test_signal_guidance_does_not_depend_on_how_rows_are_computed(models: Path, rows: str) -> None:
    pipe = build()
    pipe.guidance_rows = rows
    joint = attach(pipe, models, signal_scale=1.5)
    close(torch.cat([run(pipe), joint.partner]), EXPECTED["signal"])


# -- composition -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", ["auto", "batched", "sequential"])
def test_with_pag_the_perturbed_side_still_attends_to_its_partner(
    models: Path, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = build()
    pipe.guidance_rows = rows
    attach(pipe, models)
    call: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "negative_prompt": None}
    plain = run(pipe, **call)
    with pipe.guidance("pag", scale=2.0, layers="mid"):
        guided = run(pipe, **call)
    stock = processors._attend
    perturbed = {part for name, part in pipe.unet.mid_block.named_modules() if name.endswith("attn1")}

    def attend(attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
        if attn in perturbed and not attn.processor.crosses:
            return value  # the identity as attention map
        return stock(attn, query, key, value, mask)

    monkeypatch.setattr(processors, "_attend", attend)
    by_hand = run(pipe, **call)
    close(guided, plain + 2.0 * (plain - by_hand))
    assert not torch.allclose(guided, plain, atol=1e-3)


def test_with_cfg_and_pag_on_both_kinds_of_rows(models: Path) -> None:
    results = []
    for rows in ("auto", "batched", "sequential"):
        pipe = build()
        pipe.guidance_rows = rows
        joint = attach(pipe, models, mode="joint", signal_scale=0.5)
        pipe.add_guidance("pag", scale=2.0)
        results.append(torch.cat([run(pipe), joint.partner]))
    assert not torch.allclose(results[0][:1], EXPECTED["joint"][:1], atol=1e-2)
    close(results[1], results[0])
    close(results[2], results[0])


def test_it_acts_on_sdxl(tmp_path: Path) -> None:
    sdxl = CASES["sdxl"]
    pipe = trimtab.guide(sdxl.build())
    plain = zoo_run(pipe, sdxl)

    def loras(attention: Any, name: str) -> dict[str, LowRank]:
        found = {}
        for projection in PROJECTIONS:
            linear = attention.get_submodule(projection)
            down, up = noise(f"{name}.{projection}", 4, linear.in_features), noise(name, linear.out_features, 4)
            found[projection] = LowRank(down / 8, up / 8)
        return found

    blocks = {
        name: Block(
            noise(name, 2 * block.attn1.out_dim, 2 * block.attn1.out_dim) / 8,
            loras(block.attn1, "x"),
            loras(block.attn1, "y"),
            {part: loras(getattr(block, part), part) for part in ("attn1", "attn2")},
        )
        for name, block in blocks_of(pipe.unet).items()
    }
    save(tmp_path / "depth", blocks)
    joint = pipe.add_guidance("joint", weights=str(tmp_path), model="depth", mode="joint")
    made = zoo_run(pipe, sdxl)
    assert not torch.allclose(made, plain, atol=1e-3)
    assert joint.partner.shape == made.shape
    pipe.clear_guidance()
    assert torch.equal(zoo_run(pipe, sdxl), plain)


# -- files -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def published(models: Path, tmp_path: Path) -> Path:
    """The layout as it is published: the post projections in a pickle, among other tensors."""
    folder = tmp_path / "depth"
    shutil.copytree(models / "depth", folder)
    posts = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**posts, "down_blocks.0.attn1.to_q.lora_A.y_lora.weight": torch.zeros(2)}, folder / "model.pth")
    return tmp_path


def test_a_pickle_is_read_only_where_that_is_asked_for(published: Path) -> None:
    pipe = build()
    with pytest.raises(WeightsError, match=r"trimtab convert depth/model\.pth.*allow_pth=True"):
        attach(pipe, published)
    attach(pipe, published, allow_pth=True)
    close(run(pipe), EXPECTED["condition"][:1])


def test_the_models_of_a_folder_are_named_where_none_is_chosen(models: Path, published: Path, tmp_path: Path) -> None:
    for folder in (models, published):
        with pytest.raises(WeightsError, match=r"choose one with model=: depth"):
            build().add_guidance("joint", weights=str(folder), image="depth.png")
    with pytest.raises(SourceError, match="no file or folder"):
        build().add_guidance("joint", weights=str(tmp_path / "nowhere"), image="depth.png")


def test_a_pickle_with_more_than_tensors_is_not_read(published: Path) -> None:
    (published / "depth" / "model.pth").unlink()
    torch.save({"a.conv1n.weight": Path("anything")}, published / "depth" / "model.pth")
    with pytest.raises(WeightsError, match="holds more than tensors") as refused:
        attach(build(), published, allow_pth=True)
    assert "Path" in str(refused.value) and "safe_globals" not in str(refused.value)  # what, and no unsafe advice
    (published / "depth" / "model.pth").write_bytes(b"no pickle at all")
    with pytest.raises(WeightsError, match=r"model\.pth holds more than tensors, or is damaged") as refused:
        attach(build(), published, allow_pth=True)
    assert "weights_only" not in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_convert_writes_the_safetensors_beside_it(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(published / "depth" / "model.pth")]) == 0
    assert capsys.readouterr().out.strip() == str(published / "depth" / "model.safetensors")
    pipe = build()
    attach(pipe, published)
    close(run(pipe), EXPECTED["condition"][:1])
    assert main(["convert", str(published / "nothing.pth")]) == 2


def test_a_lora_folder_may_be_that_of_peft(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "depth", tmp_path / "depth")
    for kind in ("xy_lora", "yx_lora", "y_lora"):
        folder = tmp_path / "depth" / kind
        tensors = load_file(folder / "pytorch_lora_weights.safetensors")
        (folder / "pytorch_lora_weights.safetensors").unlink()
        renamed = {}
        for name, tensor in tensors.items():
            letter = ".lora_A." if ".lora.down." in name else ".lora_B."
            base = name.removeprefix("unet.").replace(".lora.down.", letter).replace(".lora.up.", letter)
            renamed[f"base_model.model.{base}"] = tensor / 2 if letter == ".lora_B." else tensor
        save_weights(folder / "adapter_model.safetensors", renamed)
        (folder / "adapter_config.json").write_text(json.dumps({"r": case.RANK, "lora_alpha": 2 * case.RANK}))
    pipe = build()
    attach(pipe, tmp_path)
    close(run(pipe), EXPECTED["condition"][:1])


def narrower(folder: Path) -> None:
    posts = load_file(folder / "model.safetensors")
    save_weights(folder / "model.safetensors", {name: tensor[:4, :4] for name, tensor in posts.items()})


def without_a_lora(folder: Path) -> None:
    path = folder / "xy_lora" / "pytorch_lora_weights.safetensors"
    tensors = load_file(path)
    save_weights(path, {name: tensor for name, tensor in tensors.items() if "mid_block" not in name})


def of_another_width(folder: Path) -> None:
    path = folder / "y_lora" / "pytorch_lora_weights.safetensors"
    save_weights(path, {n: t if "down" in n else torch.cat([t, t]) for n, t in load_file(path).items()})


def with_nan(folder: Path) -> None:
    posts = load_file(folder / "model.safetensors")
    next(iter(posts.values()))[0, 0] = float("nan")
    save_weights(folder / "model.safetensors", posts)


def of_two_ranks(folder: Path) -> None:
    path = folder / "xy_lora" / "pytorch_lora_weights.safetensors"
    save_weights(path, {n: t[:, :2] if "mid_block" in n and ".up." in n else t for n, t in load_file(path).items()})


def with_infinity(folder: Path) -> None:
    path = folder / "yx_lora" / "pytorch_lora_weights.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_weights(path, tensors)


def truncated(folder: Path) -> None:
    path = folder / "xy_lora" / "pytorch_lora_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_a_foreign_block(folder: Path) -> None:
    posts = load_file(folder / "model.safetensors")
    posts["down_blocks.7.attentions.0.transformer_blocks.0.conv1n.weight"] = torch.zeros(8, 8)
    save_weights(folder / "model.safetensors", posts)


def of_peft(config: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        lora = folder / "xy_lora"
        (lora / "pytorch_lora_weights.safetensors").rename(lora / "adapter_model.safetensors")
        tensors = load_file(lora / "adapter_model.safetensors")
        named = {name.replace(".lora.down.", ".lora_A."): tensor for name, tensor in tensors.items()}
        save_weights(lora / "adapter_model.safetensors", named)
        (lora / "adapter_config.json").write_text(config)

    return damage


def without_a_post(folder: Path) -> None:
    posts = load_file(folder / "model.safetensors")
    save_weights(folder / "model.safetensors", {n: t for n, t in posts.items() if not n.startswith("mid_block")})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (of_two_ranks, r"xy_lora/pytorch.*mid_block.*\.up has shape \(16, 2\), .* with rank 4 needs \(16, 4\)"),
        (with_infinity, r"yx_lora/pytorch.*of shape .* holds numbers that are not finite"),
        (truncated, r"xy_lora/pytorch_lora_weights\.safetensors is no safetensors file that can be read"),
        (without_a_post, r"depth/model\.safetensors lacks mid_block.*conv1n\.weight"),
        (narrower, r"conv1n\.weight has shape \(4, 4\), but UNet2DConditionModel needs \(8, 8\) or \(16, 16\)"),
        (without_a_lora, r"lacks the LoRA of mid_block\..*attn1n\.to_q"),
        (of_another_width, r"attn1\.to_q\.lora\.up has shape \(16, 4\), but this Attention with rank 4 needs \(8, 4\)"),
        (with_a_foreign_block, r"holds down_blocks\.7.*, but UNet2DConditionModel has no such block"),
        (of_peft('{"r": 8, "lora_alpha": 8}'), r"says r=8, but .*to_.*lora_A.* has shape \(4, "),
        (of_peft('{"r": 4}'), r"adapter_config\.json does not say lora_alpha and r"),
        (of_peft('{"r": 0, "lora_alpha": 4}'), r"adapter_config\.json does not say lora_alpha and r"),
        (of_peft("{"), r"adapter_config\.json does not say lora_alpha and r"),
        (of_peft('{"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": 8}}'), r"asks for alpha_pattern"),
        (with_nan, r"conv1n\.weight of shape \(16, 16\) holds numbers that are not finite"),
    ],
)
def test_a_model_that_does_not_fit_is_one_clear_error(models: Path, tmp_path: Path, damage: Any, message: str) -> None:
    shutil.copytree(models / "depth", tmp_path / "depth")
    damage(tmp_path / "depth")
    pipe = build()
    before = fingerprint(pipe.unet)
    with pytest.raises(WeightsError, match=message):
        attach(pipe, tmp_path)
    assert not pipe.guidances
    assert fingerprint(pipe.unet) == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weights": None}, "weights is missing"),
        ({"image": None}, "image is missing, which mode='condition' needs"),
        ({"mode": "depth"}, "mode='depth'"),
        ({"own_mask": case.mask()}, "own_image and own_mask are needed together"),
    ],
)
def test_a_wrong_parameter_is_refused_when_it_is_attached(models: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        attach(build(), models, **wrong)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"])
def test_a_scheduler_with_several_calls_a_level_is_refused(models: Path, name: str) -> None:
    with pytest.raises(UnsupportedPipelineError, match=f"{name} calls the UNet several times"):
        attach(build(name), models)


def test_a_run_that_ends_before_its_last_level_is_refused(models_xl: Path) -> None:
    pipe = build(xl=True)
    attach(pipe, models_xl)
    with pytest.raises(UnsupportedPipelineError, match=r"denoising_end=0\.8 ends the run before its last noise level"):
        run(pipe, denoising_end=0.8)


@pytest.mark.parametrize("mode", ["condition", "estimate", "joint", "coarse"])
def test_with_the_scheduler_that_makes_one_step_more_than_it_has_levels(models: Path, mode: str) -> None:
    pipe = build()
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    stock = run(pipe)
    joint = attach(pipe, models, mode=mode)
    made = run(pipe)
    assert made.isfinite().all() and not torch.allclose(made, stock, atol=1e-3)
    assert joint.partner.isfinite().all() and joint.partner.shape == made.shape
    pipe.clear_guidance()
    assert torch.equal(run(pipe), stock)


def test_a_pipeline_that_begins_from_an_image_is_refused(models: Path) -> None:
    pipe = trimtab.guide(diffusers.StableDiffusionImg2ImgPipeline(**build().components, requires_safety_checker=False))
    with pytest.raises(UnsupportedPipelineError, match=r"StableDiffusionImg2ImgPipeline begins from an .*own_mask"):
        attach(pipe, models)


def test_beside_a_guidance_that_evaluates_steps_again_it_is_refused(models: Path) -> None:
    pipe = build()
    attach(pipe, models)
    pipe.add_guidance("steered", losses=(lambda image: image.flatten(1).mean(1),), recurrence=2)
    with pytest.raises(ConflictError, match="steered: repeats above 1 are not possible beside depth"):
        run(pipe)


def test_a_mask_lies_on_its_image_whatever_the_aspect_ratio(models: Path) -> None:
    """One picture, white on the right, as image and as mask."""
    picture = Image.new("RGB", (64, 32), "black")
    picture.paste("white", (40, 0, 64, 32))
    pipe = build()
    joint = attach(pipe, models, mode="joint", image=picture, mask=picture)
    inputs: list[Inputs] = []
    original = Inputs._mask

    def watched(self: Inputs, value: Any, name: str) -> torch.Tensor:
        inputs.append(self)
        return original(self, value, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inputs, "_mask", watched)
        run(pipe)
    (made,) = inputs
    processor = pipe.image_processor
    height, width = (side * int(pipe.vae_scale_factor) for side in joint.partner.shape[2:])
    pixels = processor.preprocess([picture], height=height, width=width, resize_mode="crop")
    seen = torch.nn.functional.interpolate(pixels[:, :1], tuple(joint.partner.shape[2:]))
    assert torch.equal(original(made, picture, "mask")[:1], (seen > 0).float())


def test_what_a_run_leaves_is_its_own_partner(models: Path) -> None:
    pipe = build()
    joint = attach(pipe, models)
    run(pipe)
    assert joint.partner is not None
    joint.joint_scale = 0.0
    run(pipe)
    assert joint.partner is None


def stopped_after(steps: int) -> dict[str, Any]:
    """An argument of a call that a user stops after so many steps, as a button does."""

    def stop(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index + 1 == steps
        return tensors

    return {"callback_on_step_end": stop}


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("mode", ["joint", "coarse"])
def test_of_an_interrupted_run_there_is_the_partner_as_of_the_last_step(
    mode: str, scheduler: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = build(scheduler)
    joint = attach(pipe, models, mode=mode)
    states: list[torch.Tensor] = []
    step = Partner.after_step

    def watched(self: Partner, *args: Any) -> torch.Tensor:
        own = step(self, *args)
        states.append(self.latents)
        return own

    monkeypatch.setattr(Partner, "after_step", watched)
    whole = run(pipe)
    finished, steps = joint.partner, len(states)
    for done in (2, steps - 1):
        own = run(pipe, **stopped_after(done))
        assert torch.equal(joint.partner, states[done - 1])
        assert not torch.allclose(joint.partner, finished, atol=1e-3) and not torch.allclose(own, whole, atol=1e-3)
    assert torch.equal(run(pipe, **stopped_after(steps)), whole)
    assert torch.equal(joint.partner, finished)


def test_of_an_interrupted_run_a_given_partner_is_what_was_given(models: Path) -> None:
    pipe = build()
    for mode, given in (("condition", "depth"), ("estimate", "x")):
        joint = attach(pipe, models, mode=mode, mask=case.mask())
        run(pipe, **stopped_after(1))
        assert torch.equal(joint.partner, case.latents(given))
        pipe.clear_guidance()


def test_of_an_interrupted_run_the_partner_comes_as_the_pipelines_picture_does(models_xl: Path) -> None:
    pipe = build(xl=True)
    joint = attach(pipe, models_xl, mode="joint")
    for kind, size in (("pil", "size"), ("pt", "shape"), ("np", "shape")):
        made = run(pipe, output_type=kind, **stopped_after(1))
        assert type(joint.partner) is type(made)
        assert getattr(joint.partner[0], size) == getattr(made[0], size)
        assert not getattr(joint.partner, "requires_grad", False)


def test_a_run_that_failed_leaves_no_partner(models: Path) -> None:
    pipe = build()
    joint = attach(pipe, models, mode="joint")
    run(pipe)

    def fail(pipe: Any, *args: Any) -> Any:
        pipe._interrupt = True
        raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="broken on purpose"):
        run(pipe, callback_on_step_end=fail)
    assert joint.partner is None


@pytest.mark.parametrize(("weights", "model", "word"), [
    ("./unicon", "depth", "depth_map, "), ("./unicon/depth", None, "depth_map, "),
    ("./unicon/pose/", None, "pose_map, "), ("./mine", None, ""),
])  # fmt: skip
def test_the_trigger_word_is_known_by_the_models_folder(weights: str, model: str | None, word: str) -> None:
    assert Joint(weights=weights, model=model, image="depth.png").word == word


def test_a_controlnet_speaks_to_the_pipelines_own_side_alone() -> None:
    residual, partner = torch.arange(1.0, 3.0).view(2, 1, 1, 1), cast("Partner", object())
    for part in (_on_own(residual, [None, partner]), *_on_own([residual], [None, partner])):
        assert part.flatten().tolist() == [1.0, 0.0, 2.0, 0.0]


def controlled(strength: float) -> tuple[Any, dict[str, Any]]:
    """The same pipeline with a ControlNet, and what its call takes for it."""
    parts = build().components
    control = diffusers.ControlNetModel.from_unet(
        parts["unet"], conditioning_embedding_out_channels=(4, 8), load_weights_from_unet=False
    )
    case.filled(control, "control")
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)
    picture = Image.new("RGB", (case.SIDE, case.SIDE), (200, 40, 90))
    return guided(pipe), {"image": picture, "controlnet_conditioning_scale": strength}


@pytest.mark.parametrize("options", [{"signal_scale": 1.5}, {"mode": "joint", "stop": 0.5}, {"mode": "estimate"}])
def test_beside_a_controlnet_that_says_nothing_it_is_what_it_is_without_one(
    options: dict[str, Any], models: Path
) -> None:
    sides = []
    for pipe, call in ((build(), {}), controlled(0.0)):
        joint = attach(pipe, models, **options)
        sides.append(torch.cat([run(pipe, **call), joint.partner]))
    close(sides[1], sides[0])


def test_a_controlnet_reaches_the_partner_through_joint_attention_alone(models: Path) -> None:
    (silent, unheard), (pipe, call) = controlled(0.0), controlled(1.0)
    stock = run(pipe, **call)
    joint, other = attach(pipe, models, mode="joint"), attach(silent, models, mode="joint")
    both = run(pipe, **call)
    assert not torch.allclose(both, run(silent, **unheard), atol=1e-2)
    assert not torch.allclose(joint.partner, other.partner, atol=1e-2)
    for guidance in (joint, other):
        guidance.joint_scale = 0.0
    assert torch.equal(run(pipe, **call), stock)
    run(silent, **unheard)
    close(joint.partner, other.partner)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"signal_scale": 1.0}, {"mode": "estimate"}, {"mode": "joint"}, {"mode": "coarse", "mask": case.mask()}],
    ids=["condition", "estimate", "joint", "coarse"],
)
def test_in_half_precision_both_sides_are_those_of_full_precision_to_rounding(
    options: dict[str, Any], dtype: torch.dtype, models: Path
) -> None:
    sides = []
    for kind in (torch.float32, dtype):
        pipe = build().to(kind)
        given = case.latents("x" if options.get("mode") == "estimate" else "depth")
        joint = attach(pipe, models, **{"image": given.to(kind), **options})
        own = run(pipe, latents=case.latents("noise").to(kind))
        assert own.dtype == joint.partner.dtype == kind
        sides.append(torch.cat([own, joint.partner]).float())
    off = (sides[1] - sides[0]).norm() / sides[0].norm()
    assert 0 < off < (0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_on_sdxl_its_pictures_pass_an_autoencoder_in_full_precision(
    dtype: torch.dtype, models_xl: Path
) -> None:
    pipe = build(xl=True).to(dtype)
    joint = attach(pipe, models_xl, mode="coarse", image=Image.new("RGB", (case.SIDE, case.SIDE), (200, 40, 90)))
    seen: list[torch.dtype] = []
    for part in (pipe.vae.encoder.conv_in, pipe.vae.decoder.conv_in):
        part.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    run(pipe, latents=case.latents("noise").to(dtype), output_type="pt")
    assert joint.partner.isfinite().all()
    assert set(seen) == {torch.float32 if dtype == torch.float16 else dtype}
    assert pipe.vae.dtype == dtype


def test_images_are_one_or_one_for_each_prompt_or_image(models: Path) -> None:
    pipe = build()
    attach(pipe, models, image=case.latents("depth").repeat(2, 1, 1, 1))
    with pytest.raises(ParameterError, match="joint: image holds 2 images for 4; give one, or one for each prompt"):
        run(pipe, prompt=[case.PROMPT] * 4, negative_prompt=[case.NEGATIVE] * 4, latents=None)


def test_an_estimate_beside_another_joint_guidance_is_refused(models: Path) -> None:
    pipe = build()
    attach(pipe, models, mode="estimate")
    with pytest.raises(ConflictError, match="mode='estimate'"):
        attach(pipe, models, "pose")
        run(pipe)


def test_a_call_costs_little_more_than_as_many_rows() -> None:
    assert 1.0 < benchmark("flops").joint() <= 1.23
