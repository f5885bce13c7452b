"""A model card is valid whatever a line and its licence are called; judged by parsers of YAML and Markdown."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from components.publish import hub_metadata, markdown
from components.publish.export_table import export_lines
from components.publish.facts import VersionFacts
from components.publish.model_card import model_card
from qlora_retrain.config.sections import PublishConfig
from qlora_retrain.pipeline.plan import Plan

TEXTS = [
    "Sorts tickets.",
    "---\nlicense: mit\n---",
    "a: b # c",
    "- item\n- item",
    "# Heading\n\n> quote\n\n1. one\n\n    code",
    "'single' \"double\" `code` ``` fence",
    "<script>alert(1)</script> <b>bold</b> &lt; &amp; <!-- gone -->",
    "a | b || c\n|---|---|",
    "*emphasis* __strong__ _a_ snake_case ~~gone~~ [link](http://x) ![image](y) {{ jinja }} $math$",
    "naïve 😀 日本語 \u2028 separated \u0085 here",
    "tab\tand\r\nreturn\x00nul\x1b[31m",
    "Überschrift\n===",
    "\\backslash \\* \\",
    "%YAML 1.2\n...\n? key\n: value\n! tag @at",
    "0\x85",
    "no\u2029yes\ufeff",
]


def plain_text(html: str) -> str:
    """What a browser shows of it."""
    import html as entities

    return " ".join(entities.unescape(re.sub(r"<[^>]*>", " ", html)).split())


def visible(text: str) -> str:
    """A text as one line without control characters."""
    return " ".join(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", " ", text).split())


def parse(card: str) -> tuple[dict[str, Any], str]:
    """The front matter, read as a hub does, and the body as HTML."""
    match = re.match(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL)
    assert match is not None
    fields = yaml.safe_load(match[1])
    assert isinstance(fields, dict)
    return fields, MarkdownIt("commonmark", {"html": True}).enable("table").render(match[2])


def card(made_plan: Plan, text: str, **fields: Any) -> tuple[dict[str, Any], str]:
    """A card in which everything that a line may name is this text."""
    config = PublishConfig(description=text, **fields)
    rule = {"name": text, "value": 0.5, "low": 0.4, "high": None, "limit": 0.3, "passed": True}
    verdict = {"sentence": text, "rules": [rule, rule], "contestants": {"base": {"loss": 2.0}, text: {"accuracy": 0.9}}}
    numbers = {"adapter": {"steps": 3}, "dataset": {"rows_train": 27}}
    steps = [
        step.model_copy(update={"identity": {**step.identity, "system": text}}) if "system" in step.identity else step
        for step in made_plan.steps
    ]
    plan = made_plan.model_copy(update={"steps": tuple(steps)})
    return parse(model_card(VersionFacts(config, plan, "20260131T000000Z-0123456789ab", verdict, numbers, {})))


@pytest.mark.parametrize("text", TEXTS)
def test_whatever_a_line_says_is_shown_as_text(made_plan: Plan, text: str) -> None:
    fields, body = card(made_plan, text, licence="other", licence_name=text, licence_link="https://x/y")
    licence = {"license": "other", "license_name": text, "license_link": "https://x/y"}
    assert {name: fields.get(name) for name in licence} == licence
    assert fields["library_name"] == "transformers"

    # The same elements as in a card of plain words: no text became a heading, a list, a link or a script.
    _, expected = card(made_plan, "plain words")
    assert re.findall(r"<(/?\w+)", body) == re.findall(r"<(/?\w+)", expected)
    paragraphs = [plain_text(p) for p in re.findall(r"<p>(.*?)</p>", body, re.DOTALL)]
    assert paragraphs[:2] == [visible(text), f"Verdict: {visible(text)}"]
    cells = [plain_text(c) for c in re.findall(r"<td>(.*?)</td>", body, re.DOTALL)]
    assert cells[:5] == [visible(text), "0.5", "0.4 to -", "0.3", "yes"]
    assert cells[10:18] == ["base", "-", "-", "2", visible(text), "0.9", "-", "-"]
    (block,) = re.findall(r'<pre><code class="language-text">(.*?)</code></pre>', body, re.DOTALL)
    assert plain_text(block) == visible(text)


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("mit", {"license": "mit"}),
        ("LLAMA3.1", {"license": "llama3.1"}),
        ("gemma", {"license": "gemma"}),
        ("GPL-3.0-or-later", {"license": "gpl-3.0"}),
        ("LGPL-2.1-only", {"license": "lgpl-2.1"}),
        ("AGPL-3.0-only", {"license": "agpl-3.0"}),
        ("ODbL-1.0", {"license": "odbl"}),
        ("CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}),
        # What the Hub's list lacks has its own name beside `other`.
        ("curl", {"license": "other", "license_name": "curl"}),
        ("MIT OR Apache-2.0", {"license": "other", "license_name": "MIT OR Apache-2.0"}),
        ("LicenseRef-acme", {"license": "other", "license_name": "LicenseRef-acme"}),
        ("unspecified", {"license": "unknown"}),
    ],
)
def test_a_licence_is_written_as_a_card_has_it(licence: str, expected: dict[str, str]) -> None:
    assert hub_metadata.licence_fields(PublishConfig(licence=licence)) == expected


def test_the_licence_for_people_has_its_name_and_where_to_read_it() -> None:
    config = PublishConfig(licence="other", licence_name="acme-1.0", licence_link="https://x/y")
    assert markdown.licence_text(config) == "acme-1.0 (other), https://x/y"
    assert markdown.licence_text(PublishConfig(licence="apache-2.0")) == "Apache-2.0"


@pytest.mark.parametrize("is_measured", [True, False])
def test_the_card_says_how_many_answers_ended_and_which_variables_the_template_reads(
    made_plan: Plan, is_measured: bool
) -> None:
    text = "of 200 answers 198 ended by themselves (99 %; at least 90 %)" if is_measured else "was not measured"
    rules = [
        {"name": "answers_end", "text": text, "value": 0.99 if is_measured else None, "limit": 0.9, "passed": True,
         "is_measured": is_measured},
        {"name": "of an older evaluation", "text": "", "value": 1.0, "passed": True},
    ]  # fmt: skip
    verdict = {"sentence": "passed", "rules": rules, "contestants": {}}
    steps = [
        step.model_copy(update={"identity": {**step.identity, "template_kwargs": {"enable_thinking": False}}})
        if "system" in step.identity
        else step
        for step in made_plan.steps
    ]
    plan = made_plan.model_copy(update={"steps": tuple(steps)})
    facts = VersionFacts(PublishConfig(), plan, "v", verdict, {"adapter": {}, "dataset": {}}, {})
    _, body = parse(model_card(facts))
    assert f"Ends of answers: {text}." in plain_text(body)
    cells = [plain_text(c) for c in re.findall(r"<td>(.*?)</td>", body, re.DOTALL)]
    assert (cells[4], cells[9]) == ("yes" if is_measured else "not measured", "yes")
    assert '{"enable_thinking": false}' in plain_text(body)


def test_the_card_lists_every_export_with_its_cost_and_what_its_user_must_know() -> None:
    numbers = {"size_bytes": 3 * 2**20, "loss": 1.25, "cost": 0.0125, "cost_low": 0.01, "cost_high": 0.015}
    exports = {
        "bf16": {"path": ".", **numbers, "answers_ended": 1.0, "notes": []},
        "gguf-q4_k_m": {
            "path": "exports/gguf-q4_k_m/model-q4_k_m.gguf", **numbers, "answers_ended": 0.95,
            "notes": ["61 in q5_0; 180 of 272 tensors fell back to q5_0"],
        },
        "gguf-lora": {"path": "exports/gguf-lora/adapter.gguf", **numbers, "notes": []},
    }  # fmt: skip
    text = "\n".join(export_lines({"exports": exports}))
    assert "| gguf-q4_k_m | model/exports/gguf-q4_k_m/model-q4_k_m.gguf | 3.0 | 1.2500 | +0.0125 (0.0100 to" in text
    assert "| 95.0% |" in text.replace("95.0\\%", "95.0%")
    assert "180 of 272 tensors fell back" in text
    assert "ollama create NAME -f Modelfile" in text
    assert "--lora model/exports/gguf-lora/adapter.gguf" in text
    assert "nf4" not in text
    assert export_lines({"exports": {"bf16": exports["bf16"]}}) == []
