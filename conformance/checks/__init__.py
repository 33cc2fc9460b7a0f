"""The checks of the conformance kit. Each takes a plug-in on a tiny pipeline, and says in its message what to change.

They are run by `pytest --trimtab-plugin NAME`; `pytest_trimtab` gives each its `subject`, or all its `subjects`.
"""
