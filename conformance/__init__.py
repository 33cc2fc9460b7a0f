"""The conformance kit: what every guidance must keep to, checked on tiny pipelines by `pytest --trimtab-plugin NAME`.

A plug-in that needs parameters to do anything is given them in the `conftest.py` of its package:

    from trimtab.conformance import Example

    def pytest_trimtab_example(name, pipe):
        return Example({"colours": (0.1, 0.9)})

One that works on none of the kit's pipelines gives its own, of which `tiny.py` has the parts:

    def pytest_trimtab_stages(name):
        return [Stage("mine", build=tiny_pipeline, call={"prompt": "a fox", "num_inference_steps": 2})]
"""

from .example import Example
from .stages import Stage

__all__ = ["Example", "Stage"]
