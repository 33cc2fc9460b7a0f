"""Somebody else's network, as a guidance uses it within one run: frozen, in eval mode, put back afterwards."""

from __future__ import annotations

import inspect
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from .errors import ParameterError, SourceError, TrimtabError
from .half import carried
from .shipped import located

Computation = Callable[[torch.Tensor], torch.Tensor]
LOADERS: Mapping[str, str] = {
    "classification": "AutoModelForImageClassification",
    "depth": "AutoModelForDepthEstimation",
    "segmentation": "AutoModelForSemanticSegmentation",
}
"""What loads a network from transformers, by what it does."""
OUTPUTS = ("logits", "out", "predicted_depth", "image_embeds", "text_embeds", "pooler_output", "last_hidden_state")
"""What networks of transformers and torchvision call what they return."""
WRAPPED = ("_orig_mod", "module", "base_model")
"""Under which names `torch.compile`, Accelerate and PEFT hold the network that they wrap."""
SMOOTH = re.compile("gelu|silu|swish|softplus|mish|tanh|celu|selu", re.IGNORECASE)
"""Names of activations with a smooth gradient."""


def borrow(stack: ExitStack, network: nn.Module) -> None:
    """Put a network into eval mode and freeze its parameters until the stack closes."""
    for module in network.modules():
        if module.training:
            module.training = False
            stack.callback(setattr, module, "training", True)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)


def soften(stack: ExitStack, network: nn.Module, beta: float) -> int:
    """Replace every `nn.ReLU` by `Softplus(beta)` until the stack closes; returns how many there were.

    The weights stay. Activations that are called as functions are not found.
    """
    # Not `named_children`, which leaves out the second name of one activation.
    found = [(parent, name) for parent in network.modules() for name, child in parent._modules.items()
             if type(child) is nn.ReLU]  # fmt: skip
    for parent, name in found:
        stack.callback(setattr, parent, name, getattr(parent, name))
        setattr(parent, name, nn.Softplus(beta))
    return len(found)


def check_softened(network: nn.Module, beta: float, label: str) -> None:
    """Warn where `soften` finds nothing to replace, and no activation that is smooth already."""
    if not any(type(module) is nn.ReLU or SMOOTH.search(type(module).__name__) for module in network.modules()):
        warnings.warn(
            f"{label}: beta={beta:g} does nothing, since {type(network).__name__} holds no nn.ReLU; activations that "
            "are called as functions are not found. beta=None says that this is meant.",
            stacklevel=2,
        )


@contextmanager
def refused(label: str, network: nn.Module, images: torch.Tensor) -> Iterator[None]:
    """Make one error of a parameter of whatever a network says of images that it does not take."""
    try:
        yield
    except (TrimtabError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ParameterError(
            f"{label}: classifier, {type(network).__name__}, does not take what it is shown, {list(images.shape)}: "
            f"{error} Give size, or a classifier of such images."
        ) from error


def device_of(network: nn.Module, like: torch.Tensor) -> tuple[torch.device, torch.dtype]:
    """Where a network's parameters are, and in which type; those of `like` where it has none."""
    first = next((p for p in network.parameters() if p.is_floating_point()), like)
    return first.device, first.dtype


def time_argument(network: nn.Module) -> str | None:
    """The argument of its forward that takes the timestep; `None` if it sees no noise."""
    while inner := next((network._modules[name] for name in WRAPPED if network._modules.get(name)), None):
        network = inner
    taken = inspect.signature(network.forward).parameters
    return next((name for name in ("timestep", "timesteps") if name in taken), None)


def shown_to(network: nn.Module, images: torch.Tensor, **more: Any) -> torch.Tensor:
    """What a network makes of images, `[batch, ...]` in float32; see `as_network`."""
    return as_network(network, images, lambda given: tensor_of(network(given, **more)))


def as_network(network: nn.Module, images: torch.Tensor, compute: Computation) -> torch.Tensor:
    """`compute(images)` `[batch, ...]` in float32, computed where a network is and in its own number type.

    Gradients keep their digits, also through float16.
    """
    device, dtype = device_of(network, images)

    def there(given: torch.Tensor) -> torch.Tensor:
        return compute(given.to(device, dtype)).to(images.device)

    return carried(images, there) if dtype == torch.float16 else there(images).float()


def tensor_of(output: Any) -> torch.Tensor:
    """Logits, a map or an embedding in what a network returned.

    Raises:
        TypeError: there is no tensor in it.
    """
    for name in OUTPUTS:
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if isinstance(first, torch.Tensor):
        return first
    raise TypeError(f"it returned a {type(output).__name__}; needed: a tensor, or an output with {', '.join(OUTPUTS)}.")


def load_network(
    source: str, revision: str | None, label: str, kind: str = "classification", parameter: str = "classifier"
) -> tuple[nn.Module, Any]:
    """A transformers network of images (safetensors only) and its image processor, if it has one.

    Args:
        source: folder or repository.
        revision: branch, tag or commit.
        label: of the guidance, for messages.
        kind: what it does, one of `LOADERS`.
        parameter: that names the source, for messages.

    Raises:
        SourceError: there is none, or one that was not trained to do that.
    """
    import transformers

    try:
        network, found = getattr(transformers, LOADERS[kind]).from_pretrained(
            located(source), revision=revision, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        why = textwrap.shorten(str(error), 400, placeholder=" ...")
        raise SourceError(
            f"{label}: {parameter}={source!r} gives no transformers network for {kind} of images; needed: a folder or "
            f"repository of one, with weights in safetensors format. {why}"
        ) from error
    if lacking := _untrained(network, set(found["missing_keys"])):
        raise SourceError(
            f"{label}: {parameter}={source!r} was not trained for {kind}: it lacks {lacking}, for which there would be "
            "random numbers."
        )
    return network, _processor_of(source, revision, f"{label}: {parameter}={source!r}")


def _untrained(network: nn.Module, missing: set[str]) -> str | None:
    """A part, such as the head, of which a checkpoint has nothing; some published ones lack what is never used."""
    for name, part in network.named_children():
        parameters = [f"{name}.{inner}" for inner, _ in part.named_parameters()]
        if parameters and missing.issuperset(parameters):
            return parameters[0]
    return None


def _processor_of(source: str, revision: str | None, label: str) -> Any:
    """The image processor that belongs to a network; `None` if none does."""
    import transformers
    from transformers.utils import cached_file

    files = ("preprocessor_config.json", "processor_config.json")
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if not any(cached_file(located(source), name, revision=revision, **quiet) for name in files):
        return None
    loader = transformers.AutoImageProcessor
    try:
        return loader.from_pretrained(located(source), revision=revision, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        raise SourceError(
            f"{label} has an image processor that cannot be loaded: {textwrap.shorten(str(error), 300)} Load the "
            "network yourself, and give it with size, unit_range, mean and std."
        ) from error


def names_of(network: nn.Module) -> tuple[str, ...]:
    """The names of a transformers classifier's classes; none for another module."""
    named = getattr(getattr(network, "config", None), "id2label", None) or {}
    return tuple(str(named[index]) for index in sorted(named))
