"""Tiny tokenizers and text encoders, made in memory from configurations: no files, no network."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel

from trimtab.conformance.tiny import WIDTH

QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer() -> transformers.Qwen2Tokenizer:
    """A Qwen tokenizer that knows single bytes and the marks of a chat, with a plain chat template."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, *QWEN_MARKS])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=256)
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in QWEN_MARKS])
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    return tokenizer


def _qwen_text() -> dict[str, Any]:
    return {
        "vocab_size": 256 + len(QWEN_MARKS),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 256,
    }


def qwen_text() -> transformers.PreTrainedModel:
    """The language model of Z-Image and PRX: Qwen3 without a head."""
    return transformers.Qwen3Model(transformers.Qwen3Config(**_qwen_text(), head_dim=WIDTH // 2))


def qwen_vision_text() -> transformers.PreTrainedModel:
    """The language model of Qwen-Image: Qwen2.5-VL, of which a text prompt never calls the vision tower."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **_qwen_text(),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
        },
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def clip_vision() -> transformers.PreTrainedModel:
    """A CLIP image encoder with a projection; 224x224 is what Stable Video Diffusion gives it."""
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=224,
            patch_size=112,
        )
    )
