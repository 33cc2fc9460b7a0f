"""What a pipeline computes by itself, told from its class, its source and the call's arguments."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from .components import denoisers_of, parts_of, stages_of
from .own_rows import OwnRows
from .source import nodes
from .written import UNKNOWN, WrittenCall

_CFG_NAMES = ("guidance_scale", "max_guidance_scale", "true_cfg_scale")


def has_cfg(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the call computes an unconditional prediction by itself, by the pipeline's own test where it has one."""
    # Chroma's inpainting takes a true_cfg_scale that it never reads.
    tests = isinstance(getattr(type(pipe), "do_classifier_free_guidance", None), property)
    names = [name for name in reversed(_CFG_NAMES) if not (tests and name == "true_cfg_scale")]
    scale = next((arguments[name] for name in names if arguments.get(name) is not None), 1.0)
    if "true_cfg_scale" in arguments and not tests:
        return scale > 1 and any(
            arguments.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds")
        )
    tested = _property(pipe, "do_classifier_free_guidance", scale, arguments)
    if tested is not None:
        # A call may have a test of its own, whatever its property says (Panorama).
        local = written_call(pipe, arguments).named("do_classifier_free_guidance")
        return local if isinstance(local, bool) else bool(tested)
    if (guider := getattr(pipe, "guider", None)) is not None:
        return int(guider.num_conditions) > 1
    if (stages := stages_of(pipe)) != [pipe]:
        return any(has_cfg(stage, arguments) for stage in stages)
    # A scale that is never compared with anything is given to the denoiser (distilled guidance), unless the call has a
    # further row in any case.
    return scale > 1 and (compares_scale(type(pipe)) or bool(copies_of_latents(type(pipe))))


def other_predictions(pipe: Any, arguments: Mapping[str, Any]) -> int:
    """Predictions that the call makes by itself beside the conditional and the unconditional one."""
    if _property(pipe, "do_perturbed_attention_guidance", 1.0, arguments):
        return 1
    written = own_rows(pipe, arguments).each_call()
    if written is not None and sum(written) > (own := 1 + has_cfg(pipe, arguments)):
        return sum(written) - own
    copies = copies_of_latents(type(pipe))
    return min(copies) - 2 if copies and has_cfg(pipe, arguments) else 0


def own_rows(pipe: Any, arguments: Mapping[str, Any]) -> OwnRows:
    """What the call computes by itself, as it is written."""
    candidates = {id(module) for module in denoisers_of(pipe)}
    names = [name for name, part in parts_of(pipe).items() if id(part) in candidates]
    return OwnRows(written_call(pipe, arguments), names)


def written_call(pipe: Any, arguments: Mapping[str, Any]) -> WrittenCall:
    """The call as it is written, with its arguments."""
    given = {f"{mark}{name}": value for name, value in arguments.items() for mark in ("", "_")}

    def attribute(name: str) -> Any:
        try:
            test = getattr(type(pipe), name, None)
            if isinstance(test, property) and test.fget is not None and name not in given:
                return test.fget(Seen(pipe, **given))
            return given[name] if name in given else getattr(pipe, name)
        except Exception:  # what only a running call sets
            return UNKNOWN

    return WrittenCall(type(pipe), arguments, attribute)


def _property(pipe: Any, name: str, scale: float, arguments: Mapping[str, Any]) -> Any:
    """What a property of the pipeline would be in a call; `None` where there is none."""
    test = getattr(type(pipe), name, None)
    if not isinstance(test, property) or test.fget is None:
        return None
    given = {f"_{key}": value for key, value in arguments.items() if isinstance(value, (int, float))}
    try:
        return test.fget(Seen(pipe, **{**given, "_guidance_scale": float(scale), "guidance_scale": float(scale)}))
    except Exception:  # a property that reads what only a running call sets: judge by the scale
        return scale > 1


def compares_scale(kind: Any) -> bool:
    """Whether a pipeline's call asks how large its guidance scale is."""
    return any(
        isinstance(node, ast.Compare) and any(_name(part).endswith("guidance_scale") for part in ast.walk(node))
        for node in nodes(kind.__call__)
    )


def copies_of_latents(kind: Any) -> list[int]:
    """How often a pipeline's call repeats its latents, as in `[latents] * 3`; empty if it never does."""
    return [
        node.right.value
        for node in nodes(kind.__call__)
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Mult)
        and isinstance(node.left, ast.List)
        and isinstance(node.right, ast.Constant)
        and isinstance(node.right.value, int)
        and [_name(item) for item in node.left.elts] == ["latents"]
        and node.right.value > 1
    ]


def shares_residuals(kind: Any) -> bool:
    """Whether a pipeline gives the residuals that its ControlNet found for the prompt to its negative prompt as well.

    Its call then calls the denoiser more often than the ControlNet.
    """
    called = [_name(node.func) for node in nodes(kind.__call__) if isinstance(node, ast.Call)]
    return 0 < called.count("controlnet") < called.count("transformer") + called.count("unet")


def may_rescale(kind: Any) -> bool:
    """Whether a pipeline's call measures the size of a prediction, as one that rescales its combination must."""
    return not nodes(kind.__call__) or _measures_size(kind)


def rescales(kind: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a pipeline's call is known to rescale its combination: by an argument of it, or if none asks, always."""
    switches = [name for name in arguments if "rescale" in name or "norm" in name]
    asked = any(isinstance(arguments[name], (bool, int, float)) and arguments[name] > 0 for name in switches)
    return _measures_size(kind) and (asked or not switches)


def _measures_size(kind: Any) -> bool:
    measures = {"norm", "vector_norm", "std", "rescale_noise_cfg"}
    return any(_name(node.func) in measures for node in nodes(kind.__call__) if isinstance(node, ast.Call))


def counts_from_cond(kind: Any) -> bool:
    """Whether a pipeline's call combines `c + s (c - u)`, so that a scale of 0 is no guidance and not 1."""
    sums = [node for node in nodes(kind.__call__) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)]
    products = [(_name(node.left), node.right) for node in sums if isinstance(node.right, ast.BinOp)]
    return any(
        isinstance(factor, ast.BinOp) and isinstance(factor.op, ast.Sub) and name == _name(factor.left) != ""
        for name, product in products
        if isinstance(product, ast.BinOp) and isinstance(product.op, ast.Mult)
        for factor in (product.left, product.right)
    )


def flips_sign(kind: Any) -> bool:
    """Whether a pipeline's call negates its prediction before the scheduler gets it."""

    def negated(value: ast.AST) -> str:
        """The name of what is negated here, if anything, reshaped or not."""
        if not (isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub)):
            return ""
        inner = value.operand
        while isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute):
            inner = inner.func.value
        return _name(inner)

    for node in nodes(kind.__call__):
        if isinstance(node, ast.Assign):
            name = negated(node.value)
            if name and [_name(target) for target in node.targets] == [name]:
                return True
        if isinstance(node, ast.Call) and _name(node.func) == "step" and node.args and negated(node.args[0]):
            return True
    return False


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


class Seen:
    """The pipeline as its own methods would see it with some attributes set."""

    def __init__(self, pipe: Any, **attributes: Any) -> None:
        self._pipe = pipe
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)
