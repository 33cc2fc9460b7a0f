"""How many images a pipeline's call makes, told from its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def prompts_of(arguments: Mapping[str, Any]) -> int:
    """The number of prompts."""
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    if isinstance(prompt, (list, tuple)):
        return len(prompt)
    return 1 if prompt is not None or embeds is None else len(embeds)


def images_for_each(arguments: Mapping[str, Any]) -> int:
    """Images for each prompt."""
    return int(arguments.get("num_images_per_prompt") or 1)
