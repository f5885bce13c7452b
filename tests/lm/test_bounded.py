"""Templates and tokenizers that would take the machine: each is an error of usage, within seconds and a GiB or two."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core.bounds import Bounds, TimeIsUp
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import bounded
from qlora_retrain.lm.chat import ChatTokenizer, load_tokenizer
from qlora_retrain.lm.chat_format import ChatFormat


@pytest.fixture
def chat_tokenizer(tiny_model: Path) -> ChatTokenizer:
    return load_tokenizer(tiny_model, ChatFormat())


ROW = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "nested loops": LOOP,
    "long range": "{% for i in range(10**12) %}{% endfor %}",
    "repeated text": "{{ 'a' * 10**10 }}",
    "centred": "{{ 'a'|center(10**10) }}",
    "joined": "{{ (['a' * 10**8] * 100)|join }}",
    "replaced": "{{ ('a' * 10**5)|replace('a', 'b' * 10**5) }}",
    "formatted": "{{ '%09999999999d'|format(1) }}",
    "number": "{% set x = 9**(9**9) %}{{ x is even }}",
    "list": "{% set x = [0] * 10**10 %}{{ x|length }}",
    "growing": "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
    "long output": "{{ 'a' * 10**8 }}",
    "in a macro": "{% macro f(n) %}{% for i in range(9) %}{{ f(n + 1) if n < 60 }}{% endfor %}{% endmacro %}{{ f(0) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_cannot_take_the_machine(
    name: str, chat_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "RENDER_SECONDS", 0.3)
    began = time.process_time()
    # What the sandbox refuses by itself raises inside the template; everything else is stopped.
    with pytest.raises((UsageError, OverflowError)):
        bounded.render(chat_tokenizer.tokenizer, ROW, chat_template=HOSTILE[name])
    assert time.process_time() - began < 40
    # The bounds are lifted again.
    assert len("a" * (1 << 20)) == 1 << 20


def test_a_data_sets_hostile_row_is_an_error_of_the_step_and_not_of_the_row(
    chat_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "RENDER_SECONDS", 0.3)
    marked = "{% if m.content == 'go' %}" + LOOP + "{% endif %}"
    chat_tokenizer.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + marked + "{% endfor %}"
    message = r"more than 0\.3 s or 1,024 MiB to render one chat; choose another data\.template"
    with pytest.raises(UsageError, match=message):
        chat_tokenizer.render([{"role": "user", "content": "go"}])


def test_bounds_count_what_is_added_and_nest_in_what_was_there() -> None:
    before = b"a" * (64 << 20)
    with Bounds(256 << 20):
        added = b"b" * (128 << 20)
        with pytest.raises(MemoryError):
            bytes(512 << 20)
    assert len(before) + len(added) == 192 << 20
    with pytest.raises(TimeIsUp), Bounds(1 << 30, 0.05):
        sum(i for i in iter(int, 1))


PROGRAM = """
import sys
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import bounded
tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?"))
kind, text = sys.argv[1], "a" * 40 + "b"
if kind == "backtracking":
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
if kind == "many searches":
    tokenizer.normalizer, text = normalizers.Replace(Regex("(a|a){18}[cd]"), "x"), "a" * 100_000 + "b"
if kind == "growth":
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("a", "a" * 10)] * 8)
bounded.TOKENIZE_SECONDS, bounded._TOKENIZE_BYTES = 2.0, 300 << 20
try:
    bounded.tokenize(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [text])
except UsageError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("kind", ["backtracking", "many searches", "growth"])
def test_a_tokenizers_pattern_ends_with_12_and_its_reason(kind: str) -> None:
    # A process of its own, since it is the process that ends.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, kind]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 12, ended.stderr[-2000:]
    assert "a pattern of its tokenizer.json searches too long, or makes the text too long" in ended.stderr


@pytest.mark.parametrize("pattern", ["(" * 100_000 + "a" + ")" * 100_000, "a{100001}", "(a"])
def test_a_pattern_that_cannot_be_read_is_an_error_of_usage(tiny_model: Path, tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps({**document, "pre_tokenizer": split}))
    with pytest.raises(UsageError, match=r"no tokenizer that can be loaded|a pattern of its tokenizer"):
        load_tokenizer(folder, ChatFormat())


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "RagTokenizer"}, "is a RagTokenizer that is none of a language"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "look at tokenizer_class and model_max_length"),
        (
            "tokenizer.json",
            {"model": {"type": "WordPiece", "unk_token": "none", "vocab": {"a": 0}}},
            "the tokenizer cannot tokenize a text: .*Missing|no tokenizer that can be loaded",
        ),
    ],
)
def test_a_tokenizer_of_another_kind_is_an_error_of_usage(
    tiny_model: Path, tmp_path: Path, file: str, fields: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    document = json.loads((folder / file).read_text())
    if "model" in fields:
        fields["model"] |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    (folder / file).write_text(json.dumps({**document, **fields}))
    with pytest.raises(UsageError, match=message):
        load_tokenizer(folder, ChatFormat()).encode(ROW)


def test_added_tokens_of_megabytes_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    document = json.loads((folder / "tokenizer.json").read_text())
    token = {**document["added_tokens"][0], "id": 512, "content": "x" * (2 << 20)}
    document["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match=r"its added tokens have 2,097,\d+ characters, and 1,048,576 are the most"):
        load_tokenizer(folder, ChatFormat())


def test_a_template_that_is_slow_for_every_chat_is_stopped_before_it_has_rendered_all(
    chat_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "_FREE_SECONDS", 0.5)
    # So little that the calls of a fast machine are slow too.
    monkeypatch.setattr(bounded, "_MEAN_SECONDS", 0.0001)
    monkeypatch.setattr(bounded, "_rendering", bounded._Budget("chat template", "mend it"))
    slow = "{% for i in range(99999) %}{% endfor %}"

    def render_all() -> None:
        for _ in range(1000):
            bounded.render(chat_tokenizer.tokenizer, ROW, chat_template=slow)

    with pytest.raises(
        UsageError, match=r"the chat template took 1 s for \d+ calls, and 0\.0001 s for each are the most"
    ):
        render_all()
    assert bounded._rendering.number < 1000


GROWTH = """
import json, sys
from pathlib import Path
from qlora_retrain.lm import bounded
from qlora_retrain.lm.chat import load_tokenizer
from qlora_retrain.lm.chat_format import ChatFormat
path = Path(sys.argv[1]) / "tokenizer.json"
replace = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 40}
document = json.loads(path.read_text()) | {"normalizer": {"type": "Sequence", "normalizers": [replace] * 6}}
path.write_text(json.dumps(document))
tokenizer = load_tokenizer(path.parent, ChatFormat())
tokenizer.find_mark("x")
bounded._TOKENIZE_BYTES = 300 << 20
tokenizer.find_mark("e")
"""


def test_a_normalizer_that_makes_a_text_too_long_is_stopped_where_marks_are_searched(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", GROWTH, str(folder)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 12, ended.stderr[-2000:]
    assert "makes the text too long" in ended.stderr
