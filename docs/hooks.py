"""What mkdocs builds beside the written pages: one page a plug-in, made from its class, and equations as MathML."""

from __future__ import annotations

import html
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

from trimtab.guidance import listing, registry

IMAGES = Path(__file__).parent / "images"
# What a plug-in's `needs` mean to a user.
NEEDS = {
    "attention": "a denoiser with self-attention that can be perturbed; any other is refused by name "
    "([layers of each](../reach.md))",
    "gradient": "gradients, so no call under `torch.inference_mode()`",
    "level": "a scheduler whose noise levels are known; any other is refused by name",
}
# What the pictures were made with, where it is not the Fashion-MNIST model alone.
MODELS = {
    "autoguidance": "the Fashion-MNIST model, and 300 training steps of another as the weaker one,",
    "cfg": "`emoji-sd`",
    "easycontrol": "`emoji-flux` and [`emoji-easycontrol`](../controls-easycontrol.md)",
    "joint": "`emoji-sd` and [`emoji-unicon`](../controls-unicon.md)",
    "pag": "`emoji-sd`",
    "perp_neg": "`emoji-sd`",
    "ppap": "the Fashion-MNIST model and [trained experts](../classifiers.md)",
    "seg": "`emoji-sd`",
    "slg": "`emoji-sd`",
    "smooth": "`emoji-sd` and [`emoji-smooth`](../controls-smooth.md)",
}
OF_CONTROLS = ("easycontrol", "joint", "smooth")
WINDOW = ("start", "stop", "sigma_max", "sigma_min")
PARAMETERS = "| parameter | type | default | allowed | |\n| --- | --- | --- | --- | --- |\n"


def built_in() -> list[dict[str, Any]]:
    """The plug-ins of this package, with all that is known of each."""
    found = [listing.details(name) for name in registry.plugins()]
    return [one for one in found if one["distribution"] == "trimtab"]


def on_config(config: Any) -> Any:
    """The plug-ins' pages stand in the navigation, before the page on writing one."""
    pages = ["plugins/index.md", *(f"plugins/{one['name']}.md" for one in built_in())]
    place = next(i for i, entry in enumerate(config.nav) if "Learned controls" in entry)
    config.nav.insert(place, {"Plug-ins": pages})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each plug-in, and one that lists them."""
    found = built_in()
    files.append(File.generated(config, "plugins/index.md", content=index(found)))
    for one in found:
        files.append(File.generated(config, f"plugins/{one['name']}.md", content=page(one)))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Equations as MathML, which browsers draw by themselves."""
    block = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
    inline = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
    code = re.compile(r"<code>(\\[a-zA-Z][^<]*)</code>")
    content = block.sub(lambda found: convert(html.unescape(found[1]), display="block"), content)
    for pattern in (inline, code):
        content = pattern.sub(lambda found: convert(html.unescape(found[1])), content)
    return content


def index(found: list[dict[str, Any]]) -> str:
    """The page that lists all plug-ins."""
    lines = ["# Plug-ins", "", "| plug-in | what it does | cost |", "| --- | --- | --- |"]
    for one in found:
        summary = " ".join(one["doc"].split("\n\n")[0].split())
        lines.append(f"| [`{one['name']}`]({one['name']}.md) | {summary} | {one['cost']} |")
    return "\n".join(lines)


def page(one: dict[str, Any]) -> str:
    """The page of one plug-in: equation, paper, parameters with ranges, cost, what it needs, image."""
    lines = [f"# {one['name']}", "", one["doc"], ""]
    lines += [*picture(one["name"]), ""]
    own = [parameter for parameter in one["parameters"] if parameter["name"] not in WINDOW]
    window = [parameter for parameter in one["parameters"] if parameter["name"] in WINDOW]
    lines += ["## Parameters", "", PARAMETERS + "\n".join(map(row, own)), ""] if own else []
    lines += ["## Window", "", "Outside of it the guidance costs nothing.", ""]
    lines += [PARAMETERS + "\n".join(map(row, window)), "", "## Where it acts", ""]
    lines += [f"* hooks: {', '.join(f'`{phase}`' for phase in one['phases'])} ([phases](../composing.md))"]
    denoisers = ", ".join(f"`{denoiser}`" for denoiser in only_on(one))
    lines += [f"* only on: {denoisers}"] if denoisers else [EVERYWHERE]
    lines += [f"* {CONDITIONS[one['name']]}"] if one["name"] in CONDITIONS else []
    lines += [f"* needs {NEEDS[need]}" for need in one["needs"]]
    lines += [f"* claims the slot `{one['exclusive']}`, which one guidance may hold"] if one["exclusive"] else []
    return "\n".join(lines)


EVERYWHERE = "* on every pipeline that can be guided ([reach](../reach.md)) and has what it needs"
CONDITIONS = {
    "cfg": "needs a condition, such as a prompt or a class, to leave out",
    "cfg_pp": "needs a condition, such as a prompt or a class, to leave out",
    "guider": "needs a condition, such as a prompt or a class, to leave out",
    "perp_neg": "needs a pipeline that takes prompts",
    "slg": "needs blocks that return what they take, as transformers and most UNets have",
}
"""What a plug-in needs that its declared needs do not say."""


def picture(name: str) -> list[str]:
    """The picture of a plug-in, and how it is made."""
    command = "benchmarks.controls" if name in OF_CONTROLS else "benchmarks.pictures"
    made = f"*Made with {MODELS.get(name, 'the Fashion-MNIST model')} by `python -m {command}`.*"
    if not (IMAGES / f"{name}.png").is_file():
        return [made.replace("Made", "No picture yet: it is made")]
    return [f"![The same seeds without and with {name}](../images/{name}.png)", "", made]


def only_on(one: dict[str, Any]) -> list[str]:
    """The denoisers that learned weights attach to; none where the plug-in has no such weights."""
    names = [point.name.split(".") for point in entry_points(group="trimtab.attachments")]
    return [denoiser for plugin, denoiser in names if plugin == one["name"]]


def row(parameter: dict[str, Any]) -> str:
    """One line of a table of parameters."""
    unit = f" {parameter['unit']}" if parameter["unit"] else ""
    cells = [
        f"`{parameter['name']}`", parameter["type"], f"`{default_of(parameter)}`",
        parameter["allowed"].replace("any", "") + unit, parameter["doc"],
    ]  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def default_of(parameter: dict[str, Any]) -> str:
    """As it would be typed; infinity, which JSON lacks, without quotes."""
    default = parameter["default"]
    return default if default in ("inf", "-inf") else repr(default)
