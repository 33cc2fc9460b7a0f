"""The page on branch parallelism: ratios turn by turn."""

from __future__ import annotations

from trimtab.benchmarks.branches import page


def test_the_page_shows_ratios_of_turns_not_of_medians() -> None:
    one, both, together = "1 process, 1 thread", "1 process, 2 threads", "2 processes, 1 thread each"
    result = {
        "command": "python -m benchmarks.branches", "machine": "a machine", "torch": "2", "architecture": "sd15",
        "side": 256, "steps": 2, "repeats": 3, "note": "The other core was busy.", "difference": 1e-6,
        "plan": ["branch parallel, 2 processes"],
        "seconds": {one: [4.0, 6.0, 8.0], both: [3.0, 3.0, 3.0], together: [2.0, 4.0, 2.0]},
        "times as fast": {one: [2.0, 1.5, 4.0], both: [1.5, 0.75, 1.5]},
    }  # fmt: skip
    lines = page(result).splitlines()
    assert f"| {one} | 2.000 (1.500 to 4.000) |" in lines and f"| {both} | 1.500 (0.750 to 1.500) |" in lines
    assert f"| {one} | 6.00 |" in lines and "The other core was busy." in lines
