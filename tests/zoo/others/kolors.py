"""Tiny pipelines of Kolors: Stable Diffusion XL with the language model ChatGLM."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel, RMSNorm
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from sentencepiece import sentencepiece_model_pb2 as sentencepiece

from trimtab.conformance.tiny import BETAS, CHARACTERS, CROSS, CROSS_UP, PLAIN, PLAIN_UP, WIDTH, unet, vae

from .. import picture
from .case import Case


def _tokenizer() -> ChatGLMTokenizer:
    """One of single characters; it reads its pieces from a file while it is made."""
    kinds = sentencepiece.ModelProto.SentencePiece
    model = sentencepiece.ModelProto()
    model.pieces.add(piece="<unk>", score=0.0, type=kinds.UNKNOWN)
    for mark in ("<s>", "</s>"):
        model.pieces.add(piece=mark, score=0.0, type=kinds.CONTROL)
    for character in ("▁", *CHARACTERS):
        model.pieces.add(piece=character, score=-2.0, type=kinds.NORMAL)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.model"
        file.write_bytes(model.SerializeToString())
        return ChatGLMTokenizer(str(file))


def _text_encoder() -> ChatGLMModel:
    model = ChatGLMModel(
        ChatGLMConfig(
            num_layers=2, padded_vocab_size=64, hidden_size=WIDTH, ffn_hidden_size=WIDTH, kv_channels=16,
            num_attention_heads=2, seq_length=32, multi_query_attention=True, multi_query_group_num=1,
            add_qkv_bias=True, original_rope=True,
        ),
        empty_init=False,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.ones_(module.weight)  # it is made without values
    return model


def _components() -> dict[str, Any]:
    addition = 8
    return {
        "unet": unet(
            down_block_types=(PLAIN, CROSS, CROSS),
            up_block_types=(CROSS_UP, CROSS_UP, PLAIN_UP),
            attention_head_dim=(2, 4, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=addition,
            projection_class_embeddings_input_dim=6 * addition + WIDTH,
            encoder_hid_dim=WIDTH,
            encoder_hid_dim_type="text_proj",
        ),
        "vae": vae(),
        "text_encoder": _text_encoder(),
        "tokenizer": _tokenizer(),
        "scheduler": diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    }


def kolors() -> DiffusionPipeline:
    return diffusers.KolorsPipeline(**_components())


def kolors_img2img() -> DiffusionPipeline:
    return diffusers.KolorsImg2ImgPipeline(**_components())


def kolors_pag() -> DiffusionPipeline:
    return diffusers.KolorsPAGPipeline(**_components())


CALL: dict[str, Any] = {
    "prompt": "a red fox", "negative_prompt": "blurry", "num_inference_steps": 2, "output_type": "latent",
    "max_sequence_length": 16,
}  # fmt: skip
CASES = {
    "KolorsPipeline": Case(kolors, CALL),
    "KolorsImg2ImgPipeline": Case(kolors_img2img, {**CALL, "image": picture(), "strength": 1.0}),
    "KolorsPAGPipeline": Case(kolors_pag, CALL, unmapped="switch that off: pag_scale=0", tried=1),
}
