"""Tiny language models that see pictures, with processors made of their parts: no files, no network."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel

from trimtab.conformance.tiny import WIDTH

MARKS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
END, VISION_START, VISION_END, IMAGE, VIDEO = (256 + at for at in (0, 3, 4, 5, 6))
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SEEN: dict[str, Any] = {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28}}
"""Pictures as a language model sees them: so small that one or two tokens stand for them."""


def tokenizer() -> transformers.Qwen2Tokenizer:
    """Single bytes, and the marks of a chat with pictures in it."""
    pieces = [*sorted(ByteLevel.alphabet()), *MARKS]
    made = transformers.Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], model_max_length=4096
    )
    made.add_tokens([AddedToken(mark, special=True) for mark in MARKS])
    made.chat_template = CHAT
    return made


def _text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 256 + len(MARKS), "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": None,
        "eos_token_id": END, "pad_token_id": END,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}, **more,
    }  # fmt: skip


TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH,
}  # fmt: skip


def qwen25() -> transformers.PreTrainedModel:
    config = transformers.Qwen2_5_VLConfig(text_config=_text(), vision_config=VISION, **TOKENS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen2() -> transformers.PreTrainedModel:
    vision = {"depth": 1, "embed_dim": WIDTH, "num_heads": 2, "hidden_size": WIDTH}
    config = transformers.Qwen2VLConfig(text_config=_text(), vision_config=vision, **TOKENS)
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen3(layers: int = 2) -> transformers.PreTrainedModel:
    config = transformers.Qwen3VLConfig(
        text_config=_text(head_dim=WIDTH // 2, num_hidden_layers=layers),
        vision_config={**VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **TOKENS,
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def qwen2_processor() -> transformers.ProcessorMixin:
    pictures = transformers.Qwen2VLImageProcessor(**SEEN)
    videos = transformers.Qwen2VLVideoProcessor(**SEEN)
    return transformers.Qwen2VLProcessor(pictures, tokenizer(), videos, chat_template=CHAT)


def qwen25_processor() -> transformers.ProcessorMixin:
    pictures = transformers.Qwen2VLImageProcessor(**SEEN)
    videos = transformers.Qwen2VLVideoProcessor(**SEEN)
    return transformers.Qwen2_5_VLProcessor(pictures, tokenizer(), videos, chat_template=CHAT)


def qwen3_processor() -> transformers.ProcessorMixin:
    sizes: dict[str, Any] = {"patch_size": 16, "size": {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}}
    pictures = transformers.Qwen2VLImageProcessor(**sizes)
    videos = transformers.Qwen3VLVideoProcessor(**sizes)
    return transformers.Qwen3VLProcessor(pictures, tokenizer(), videos, chat_template=CHAT)
