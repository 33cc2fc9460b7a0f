"""The measurement of the emoji models as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.evaluation.distances import Estimate

from .controls_page import ranged
from .rows import Row, interval

PAGE = """# Emoji from words

`trimtab/emoji-sd` and `trimtab/emoji-flux` draw emoji of 64x64 from a caption such as "red apple, noto style", within
seconds on any machine: the one a latent UNet with cross-attention in Stable Diffusion format, the other a flow-matching
transformer in Flux format. `trimtab models` tells which come with this package and what makes the others; the cards in
`models/` say how each was trained, and on what. The last two captions of a sheet are held out: neither was ever drawn
in training.

```python
import trimtab

pipe = trimtab.GuidedPipeline.from_pretrained("trimtab/emoji-sd")
pipe.add_guidance("pag", scale=2.0, layers="up")
image = pipe("grinning face, twemoji style", guidance_scale=3.0, num_inference_steps=25).images[0]

pipe.clear_guidance()  # without words, by a classifier of categories that ships too
pipe.add_guidance("classifier", classifier="trimtab/emoji-judge-category-0", target="Animals & Nature", scale=4.0)
image = pipe("", guidance_scale=1.0, num_inference_steps=25).images[0]

flux = trimtab.GuidedPipeline.from_pretrained("trimtab/emoji-flux")
call = {"height": 64, "width": 64, "max_sequence_length": 32, "num_inference_steps": 25}
image = flux("blue heart, noto style", negative_prompt="", true_cfg_scale=3.0, **call).images[0]
```
"""
MODEL = """
## {title}

![Eight prompts by eight seeds]({image})

{found}
"""
TABLE = """
| scale | Fréchet distance | score of its caption | of another caption |
| --- | --- | --- | --- |
{table}
"""
COMMAND = """
Drawn by

    {command}
"""
MEASURED = """
The tables: one image for each of {count} captions of held-out emoji, {steps} steps. Fréchet distance to the held-out
drawings on the features of a classifier of emoji by category (no FID), with its 95 % interval (jackknife over ten
groups of images). Score: 100 times the cosine of image and caption by `emoji-clip`, with its 95 % interval (bootstrap).
"""
TITLES = {"sd": "emoji-sd", "flux": "emoji-flux"}
FOUND = {
    "sd": "As it ships, trained for less than two hours on one core, it draws faces and hearts as anyone would name "
    "them, also those that it has not seen; of apples the colours and about the shape, of most animals and "
    "much food, the lemon and the frog among them, the colours only.",
    "flux": "Trained for less than three hours on one core, in the last of them on copies of the drawings, moved and "
    "mirrored (`--copies 8`), it draws seven of the eight lines as anyone would name them: grins with teeth, hearts, "
    "apples and lemons, and of the held-out captions the brown heart and a face, which frowns with half of the "
    "seeds. The frog is a green face of no certain animal; of most food and animals that it has not seen it has the "
    "colours and a rough outline only. It was trained with captions of 32 tokens and draws badly with more: give "
    "`max_sequence_length=32`, which the command line does by itself. After the 3,500 steps with copies the Fréchet "
    "distance of held-out captions is smaller at every scale, at 3 12.8 ± 1.7 and 14.9 ± 1.7 before, though the "
    "intervals overlap; the scores tell a caption from another a little less well than before (50.3 and 24.1, before "
    "51.4 and 23.0). 10,000 steps without copies had drawn every line, but by heart, and further from these (22.5 ± "
    "3.9). That one does not ship.",
}
"""What was seen on the sheets, to be looked at again where they are drawn anew."""
COMPARED = {
    "sd": "Guidance of 2 to 4 suits it; image and caption fit far better than with another caption at every scale. "
    "On the same captions (`trimtab sweep --prompts FILE --guidance cfg:scale=1,3 --guidance "
    "pag:scale=0,1,2,layers=up`, 20 steps) CFG 3 with PAG 1 is as near to the drawings as CFG 3 alone "
    "(Fréchet distance 13.7 and 13.8, ± 2.5); PAG alone is no nearer than no guidance (16.9 ± 4.2 and 14.1 ± "
    "3.9): what it makes cleaner in faces it makes plainer elsewhere.",
}
"""What the tables, and a sweep on the same captions, say."""


def page(shown: Sequence[str], rows: Mapping[str, Row], command: str, settings: Mapping[str, Any]) -> str:
    """The page: the sheets of models, and the tables of those that were measured."""
    text = PAGE
    for name in shown:
        text += MODEL.format(title=TITLES[name], image=f"images/emoji-{name}.png", found=FOUND.get(name, ""))
        own = {label.split(" ")[1]: row for label, row in rows.items() if label.split(" ")[0] == name}
        if own:
            text += TABLE.format(table="\n".join(map(line, own.items())))
            text += f"\n{COMPARED[name]}\n" if name in COMPARED else ""
    text += COMMAND.format(command=command)
    return text + MEASURED.format(**settings) if rows else text


def line(named: tuple[str, Row]) -> str:
    """One scale."""
    scale, row = named
    distance = Estimate(*row["frechet"])
    cells = [scale, interval(distance.value, distance.error, 2), ranged(row["score"]), ranged(row["other"])]
    return "| " + " | ".join(cells) + " |"
