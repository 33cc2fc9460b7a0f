"""The embeddings of either side's prompts: the pipeline's own, but for what is said otherwise."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch

from ...guidance.branch import COND, UNCOND, Branch
from ...guidance.errors import ParameterError
from ...guidance.run import Run

Texts = Mapping[Branch, Mapping[str, torch.Tensor]]
"""By branch, the prompt's tensors `[images, ...]` by the argument that they are given as."""


class Prompts:
    """What encodes the prompts of one run.

    Args:
        run: the run.
        each: images for each prompt.
        images: of the run.
        plain: the pipeline's own embeddings.
    """

    def __init__(self, run: Run, each: int, images: int, plain: Texts) -> None:
        self._pipe, self._arguments = run.pipeline, run.arguments
        self._each, self._count, self._plain = each, images // each, plain

    def of_side(self, word: str, prompt: str | None, negative: str | None) -> Texts:
        """One side's embeddings.

        Args:
            word: put before the prompt.
            prompt, negative: in place of the pipeline's; `None`: as there, however they were given there.

        Raises:
            ParameterError: a word before a prompt that was given as embeddings; a prompt of another length than those.
        """
        own = self._arguments.get("prompt")
        if word and prompt is None and own is None:
            raise ParameterError(
                f"joint: the pipeline was given prompt_embeds, before which the trigger word {word!r} cannot be put; "
                "give prompt=, the partner's, or trigger=''."
            )
        other = {COND: bool(word) or prompt is not None, UNCOND: negative is not None}
        if not any(other.values()):
            return self._plain
        encoded = self._encoded(word, own if prompt is None else prompt, negative)
        found = {branch: encoded[branch] if other[branch] else states for branch, states in self._plain.items()}
        lengths = {states["encoder_hidden_states"].shape[1] for states in (*found.values(), *self._plain.values())}
        if len(lengths) > 1:
            raise ParameterError(
                f"joint: the embeddings of both sides' prompts have {' and '.join(map(str, sorted(lengths)))} tokens; "
                "give the pipeline texts, or leave out prompt= and negative_prompt= and give trigger=''."
            )
        return found

    def _encoded(self, word: str, prompt: str | list[str] | None, negative: str | None) -> Texts:
        given = prompt if isinstance(prompt, list) else [prompt or ""] * self._count
        encode = type(self._pipe).encode_prompt  # not the run's own, which takes every later call for a negative prompt
        options = {
            "prompt": [word + str(text) for text in given],
            "device": self._pipe._execution_device,
            "num_images_per_prompt": self._each,
            "do_classifier_free_guidance": UNCOND in self._plain,
            "negative_prompt": [negative] * self._count if isinstance(negative, str) else None,
            "clip_skip": self._arguments.get("clip_skip"),
        }
        known = inspect.signature(encode).parameters
        with torch.no_grad():
            result = encode(self._pipe, **{name: value for name, value in options.items() if name in known})
        names = ("encoder_hidden_states", "text_embeds")
        parts = {COND: result[0::2], UNCOND: result[1::2]}
        return {branch: dict(zip(names, parts[branch], strict=False)) for branch in self._plain}
