"""The conformance kit: what every guidance must keep to, checked on tiny pipelines by `pytest --trimtab-plugin NAME`.

A plug-in that needs parameters to do anything is given them in the `conftest.py` of its package:

    from trimtab.conformance import Example

    def pytest_trimtab_example(name, pipe):
        return Example({"colours": (0.1, 0.9)})
"""

from .example import Example

__all__ = ["Example"]
