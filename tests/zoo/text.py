"""Tiny tokenizers and text encoders, made in memory from configurations: no files, no network."""

from __future__ import annotations

import string
from typing import Any

import transformers
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config, T5Tokenizer

CHARACTERS = string.ascii_lowercase + string.digits + ".,!?"
WIDTH = 32
LENGTH = 32
QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows single characters, `LENGTH` tokens long, padded with the end token."""
    pieces = [*CHARACTERS, *(f"{character}</w>" for character in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)


def clip_text(projection: bool = False, width: int = WIDTH) -> transformers.PreTrainedModel:
    """A CLIP text encoder of `width` channels, with a projection head if `projection`."""
    size = 2 * len(CHARACTERS) + 2
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer (Unigram) that knows single characters."""
    special = ["<pad>", "</s>", "<unk>"]
    scores = [(piece, 0.0) for piece in special] + [(piece, -2.0) for piece in ("▁", *CHARACTERS)]
    return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=LENGTH)


def t5_encoder(width: int = WIDTH, umt5: bool = False) -> transformers.PreTrainedModel:
    """A T5 (or UMT5) encoder of `width` channels."""
    config = (transformers.UMT5Config if umt5 else T5Config)(
        vocab_size=len(CHARACTERS) + 4,
        d_model=width,
        d_kv=8,
        d_ff=width,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu",
    )
    return (transformers.UMT5EncoderModel if umt5 else transformers.T5EncoderModel)(config)


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
