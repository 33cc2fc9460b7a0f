"""trimtab: plug-in guidance for Hugging Face Diffusers.

import trimtab

pipe = trimtab.GuidedPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
pipe.add_guidance("pag", scale=3.0)
image = pipe("a rudder with a trim tab").images[0]
"""

import lazy_loader

__version__ = "0.1.0"
# What is offered, and from where, says `__init__.pyi`; until one of them is asked for, nothing heavy is imported.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
