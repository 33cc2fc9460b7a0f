"""Tiny language models that see pictures, with processors made of their parts: no files, no network."""

from __future__ import annotations

import re
from typing import Any

import transformers
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BatchEncoding
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trimtab.conformance.tiny import WIDTH, clip_text, clip_tokenizer

MARKS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
_PAD = re.compile(r"<\|image_pad\|>")
END, VISION_START, VISION_END, IMAGE, VIDEO = (256 + at for at in (0, 3, 4, 5, 6))
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


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


class Processor:
    """Text with pictures in it, as a language model reads it; those of Transformers need torchvision for their videos.

    Args:
        patch: pixels of a side of what the vision tower takes for one patch; two by two of them are one token.
    """

    def __init__(self, patch: int = 14) -> None:
        area = (2 * patch) ** 2  # so small that one token stands for a picture
        self.image_processor = Qwen2VLImageProcessorPil(
            patch_size=patch, size={"shortest_edge": area, "longest_edge": area}
        )
        self.tokenizer = tokenizer()
        self.image_token_id = IMAGE
        self.batch_decode = self.tokenizer.batch_decode

    def apply_chat_template(self, messages: Any, tokenize: bool = False, **kwargs: Any) -> Any:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        return [self.tokenizer(text)["input_ids"]] if tokenize else text

    def __call__(self, text: list[str], images: Any = None, videos: Any = None, **kwargs: Any) -> BatchEncoding:
        seen = self.image_processor(images=images, return_tensors="pt") if images is not None else {}
        counts = (int(grid.prod()) // 4 for grid in seen.get("image_grid_thw", ()))
        parts = [_PAD.sub(lambda mark: mark.group() * next(counts), line) for line in text]
        read = self.tokenizer(parts, **kwargs)
        return BatchEncoding({**read, **seen, "mm_token_type_ids": (read["input_ids"] == IMAGE).int()})


def long_clip() -> dict[str, Any]:
    """CLIP with its 77 tokens, which Kandinsky 5 and 6 ask for by number."""
    config = transformers.CLIPTextConfig(**{**clip_text().config.to_dict(), "max_position_embeddings": 77})
    return {"text_encoder_2": transformers.CLIPTextModel(config), "tokenizer_2": clip_tokenizer()}
