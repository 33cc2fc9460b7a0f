"""The conformance kit: what every guidance must keep to, checked on tiny pipelines; see `checks.py`."""
