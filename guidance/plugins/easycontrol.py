"""EasyControl: condition images that a diffusion transformer attends to."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from PIL import Image

from ..base import Guidance
from ..errors import ParameterError
from ..parameters import parameter
from ..pins import commit, sha256
from ..run import Run


@dataclass
class EasyControl(Guidance):
    """A condition image (edges, depth, pose, a subject) by a LoRA that only the condition's own tokens pass through.

    $$ \\operatorname{softmax}\\!\\big(Q\\,[K; K_c]^\\top/\\sqrt{d} + [0; \\log s]\\big)\\,[V; V_c] $$

    The keys and values K_c, V_c of each layer come from one pass of the denoiser over the condition's tokens alone, at
    timestep 0 and with the LoRA `W h + w B A h`. They do not depend on the sample, so they are computed once for each
    distinct prompt, and for each image whose own generator draws its latents, and kept until the run ends. Attach it
    several times for several conditions. Zhang et al., "EasyControl: Adding Efficient and Flexible Control for
    Diffusion Transformer", arXiv:2503.07027.

    `lora_weight` is the published code's weight w; the image is attended to even at 0. `strength` s fades the condition
    out: at 0 there is none, and 1 is the published behaviour.

    Cost: no further evaluation. On Flux at 1024 x 1024 with one condition of 512 x 512 a step takes 1.044 of its
    floating-point operations, and the first one 0.19 more for each distinct prompt; the cache is 684 MiB in bfloat16.

    Raises:
        WeightsError: weights that do not fit the denoiser; the message names file, tensor and both shapes.
        UnsupportedPipelineError: a denoiser that no adapter is known for.
    """

    name: ClassVar[str] = "easycontrol"

    weights: str | None = parameter(None, "File, folder or Hub repository with the LoRA, in the published format.")
    image: Image.Image | str | list[Image.Image | str] | None = parameter(
        None, "Condition: a PIL image or the path of one, or a list with one for each prompt, or for each image."
    )
    kind: Literal["spatial", "subject"] = parameter(
        "spatial", "'spatial' lies over the image, whatever its aspect ratio; 'subject' appears somewhere in it."
    )
    strength: float = parameter(
        1.0, "s, by which the attention paid to the condition is multiplied; 0 leaves it out.", ge=0, off=0.0
    )
    lora_weight: float = parameter(1.0, "w, the weight of the LoRA.")
    cond_size: int = parameter(512, "Side of the condition image that the LoRA was trained with.", ge=1, unit="pixels")
    weight_name: str | None = parameter(None, "File in the folder or repository, where there are several.")
    revision: str | None = parameter(None, "Branch, tag or commit of the repository.")
    sha256: str | None = parameter(None, "What the file must hash to.")
    lora_index: int = parameter(0, "Which of the file's LoRAs; those of one condition hold one.", ge=0)
    offload_cache: bool = parameter(False, "Keep the cached keys and values in main memory.")

    def validate(self) -> None:
        super().validate()
        for name, example in (("weights", "'Xiaojiu-Z/EasyControl'"), ("image", "'edges.png'")):
            if getattr(self, name) is None:
                raise ParameterError(f"easycontrol: {name} is missing; give it, such as {name}={example}.")

    def pinned(self) -> Self:
        found = self.sha256 or sha256(self.weights, self.weight_name)
        return replace(self, revision=commit(self.weights, self.revision), sha256=found)

    def setup(self, run: Run) -> None:
        if self.strength > 0 and self.start < self.stop:
            run.attachment("easycontrol").add(self, bias=math.log(self.strength))
