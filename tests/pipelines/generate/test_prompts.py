"""The file of `--prompts`: what a line may say, and the message for one that says something else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from zoo.class_conditional import class_conditional

from trimtab import cli
from trimtab.pipelines.generate.prompts import read_prompts
from trimtab.pipelines.generate.request import LARGEST_SEED, Request, RequestError


def test_a_class_of_a_prompt_file_may_be_an_index(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"class_label": 8}\n')
    (request,) = read_prompts(file, Request())
    assert request.class_label == "8"


def test_a_prompt_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n\n  a red boat \n")
    requests = read_prompts(file, Request(seed=5))
    assert [(one.prompt, one.seed) for one in requests] == [("a fox", 5), ("a red boat", 6)]


def test_a_jsonl_file_may_say_more(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a fox", "negative_prompt": "blurry"}\n{"class_label": "cat", "seed": 9}\n')
    first, second = read_prompts(file, Request())
    assert (first.prompt, first.negative_prompt, first.seed) == ("a fox", "blurry", 0)
    assert (second.prompt, second.class_label, second.seed) == (None, "cat", 9)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["bare", "with a byte order mark"])
def test_lines_end_as_those_of_any_system_do_and_nowhere_else(tmp_path: Path, ending: str, mark: str) -> None:
    """A prompt may hold what other programs take for the end of a line: here a line separator, NEL and a tab."""
    prompts = ["a red\u2028heart", "a red\u0085heart\x0bfoo", "世界"]
    text, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_bytes(f"{mark}{ending.join(prompts)}{ending}".encode())
    rows = (json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts if "\x0b" not in prompt)
    objects.write_bytes(f"{mark}{ending.join(rows)}".encode())
    assert [one.prompt for one in read_prompts(text, Request())] == prompts
    assert [one.prompt for one in read_prompts(objects, Request())] == [prompts[0], prompts[2]]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_that_is_not_utf_8_is_named_with_its_line(tmp_path: Path, name: str, encoding: str) -> None:
    file = tmp_path / name
    file.write_bytes(b'{"prompt": "a"}\n' + '{"prompt": "Grüße"}\n'.encode(encoding))
    with pytest.raises(RequestError, match=rf"--prompts: {file}, line 2: .* is not UTF-8; save the file as UTF-8"):
        read_prompts(file, Request())


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "absent.txt", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(RequestError, match=f"--prompts: {path} cannot be read: {why}; give a text file"):
            read_prompts(path, Request())


def test_seeds_are_those_of_64_bits(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a", "seed": {LARGEST_SEED}}}\n{{"prompt": "b"}}\n')
    largest, _ = read_prompts(file, Request())
    assert torch.Generator().manual_seed(largest.seed).initial_seed() == LARGEST_SEED
    with pytest.raises(RequestError, match=f"line 2: seed: {LARGEST_SEED + 1} is not allowed"):
        read_prompts(file, Request(seed=LARGEST_SEED))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n", "holds no prompt"),
        ("p.jsonl", "{", "line 1: this is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"promt": "b"}', "line 2: .*promt.*allowed: an object with some of prompt"),
        ("p.jsonl", '"a fox"', "line 1: .*allowed: an object"),
        ("p.jsonl", '{"prompt": "a", "seed": "3"}', "line 1: seed='3' is not allowed; allowed: a whole number"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"seed": -3}', "line 3: seed: -3 is not allowed; allowed: whole"),
        ("p.jsonl", f'{{"prompt": "a", "seed": {2**64}}}', f"line 1: seed: {2**64} is not allowed; .* to {2**64 - 1}"),
        ("p.jsonl", '{"prompt": "a \\ud83d"}', r"line 1: prompt: 'a \\ud83d' is not allowed; .*'\\ud83d', half of a"),
        ("p.jsonl", '{"prompt": "a", "negative_prompt": "\\ude00"}', "line 1: negative_prompt: .* is not allowed"),
        ("p.jsonl", "[" * 100_000, "line 1: this is not JSON"),
        ("p.jsonl", '{"prompt": 3}', "line 1: prompt=3 is not allowed; allowed: a text"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match=message):
        read_prompts(tmp_path / name, Request())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"class_label": "Dog"}', r"line 2: class_label: no class 'Dog'\. .*one of 0 'Cat', 1 'Sea lion'"),
        ('{"class_label": 2}', r"line 2: class_label: no class '2'\. .*one of 0 'Cat', 1 'Sea lion'"),
        ('{"class_label": "Cat", "negative_prompt": "dark"}', r"line 2: negative_prompt: .* has no such option"),
        ('{"prompt": "a fox"}', r"line 2: .* takes a class, not a prompt: .*one of 0 'Cat', 1 'Sea lion'"),
    ],
)
@pytest.mark.parametrize("command", [["generate"], ["evaluate", "--seeds", "0-1", "--frames", "3"]])
def test_what_the_model_refuses_is_named_with_its_line_before_anything_is_made(
    tmp_path: Path, command: list[str], line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class_conditional(["Cat", "Sea lion"], side=16, prediction_type="v_prediction").save_pretrained(tmp_path / "model")
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"class_label": "Cat"}}\n{line}\n')
    made = ["--model", str(tmp_path / "model"), "--device", "cpu", "--steps", "1", "-o", str(tmp_path / "out")]
    assert cli.main([*command, *made, "--prompts", str(file)]) == 2
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert re.search(f"--prompts: {re.escape(str(file))}, {message}", said)
    assert not list(tmp_path.rglob("*.png"))
