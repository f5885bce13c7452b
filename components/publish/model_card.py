"""Write the model card in the format of the Hugging Face Hub: what a version is, how good, and how it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from components.publish import card_sections, markdown
from components.publish.export_table import export_lines
from components.publish.facts import VersionFacts
from components.publish.hub_metadata import front_matter
from components.publish.usage import usage_lines
from qlora_retrain.lm.adapter_scale import describe_adapter, has_scale


def model_card(facts: VersionFacts) -> str:
    """Return the card."""
    plan, verdict = facts.plan, facts.verdict
    return "\n".join(
        [
            front_matter(facts),
            f"# {plan.line} {facts.version}",
            "",
            markdown.paragraph(facts.config.description) or "A fine-tuned language model.",
            "",
            f"**Verdict:** {markdown.inline(verdict['sentence'])}",
            "",
            *_verdict_tables(facts),
            *_ending_lines(facts),
            *_comparison_lines(facts),
            *export_lines(facts.certificate),
            *card_sections.served_lines(facts),
            *card_sections.data_lines(facts),
            "## How it was made",
            "",
            _recipe_sentence(facts),
            "",
            *card_sections.cost_lines(facts),
            "## How to use it",
            "",
            *usage_lines(facts),
            *card_sections.ending_lines(facts),
            *card_sections.limit_lines(facts),
            *card_sections.licence_lines(facts),
        ]
    )


def _verdict_tables(facts: VersionFacts) -> Iterator[str]:
    yield "| rule | value | interval | limit | passed |"
    yield "|---|---|---|---|---|"
    for r in facts.verdict["rules"]:
        interval = f"{_number(r.get('low'))} to {_number(r.get('high'))}"
        passed = "not measured" if not r.get("is_measured", True) else "yes" if r["passed"] else "no"
        yield markdown.row(r["name"], _number(r.get("value")), interval, _number(r.get("limit")), passed)
    yield ""
    yield "| contestant | accuracy | macro-F1 | loss (nats per token) |"
    yield "|---|---|---|---|"
    for name, c in facts.verdict["contestants"].items():
        yield markdown.row(name, *(_with_interval(c, metric) for metric in ("accuracy", "macro_f1", "loss")))
    yield ""


def _ending_lines(facts: VersionFacts) -> list[str]:
    """Say how many answers ended by themselves, for a reader who looks at no table; older evaluations do not."""
    texts = [r["text"] for r in facts.verdict["rules"] if r["name"] == "answers_end"]
    return [f"Ends of answers: {markdown.inline(text)}." for text in texts[:1]] + ([""] if texts else [])


def _comparison_lines(facts: VersionFacts) -> list[str]:
    champion = facts.plan.champion.version if facts.plan.champion else "none: this is the line's first"
    base_format = facts.plan.step("quantize_model").identity.get("format", "nf4")
    base_bits = {"none": "16-bit", "mixed": "4- and 8-bit"}.get(base_format, "4-bit")
    challenger = "trained model" if facts.train["method"] == "full" else f"{base_bits} base with its adapter"
    form = "the merged form in `model/`, the form to run"
    if facts.is_alone:
        form = "the adapter in `adapter/` over the base that `model/base.json` names, the form to run"
    return [
        f"Compared with the version in production: {champion}. The numbers above are those of the {challenger}. "
        f"`evaluation/certificate.json` has those of {form}.",
        "",
    ]


def _recipe_sentence(facts: VersionFacts) -> str:
    train, numbers, plan = facts.train, facts.numbers, facts.plan
    is_16_bits = plan.step("quantize_model").identity.get("format", "nf4") == "none"
    name = "LoRA" if is_16_bits else "QLoRA"
    recipe = f"{name}: {describe_adapter(train['rank'], train['alpha'], train['method'])}"
    if train["method"] == "full":
        recipe = "Full fine-tuning: all weights trained, without an adapter"
    elif not has_scale(train["method"]):
        recipe = f"{train['method']}: {describe_adapter(train['rank'], None, train['method'])}"

    replayed = numbers["dataset"].get("rows_replay")
    return (
        f"{recipe}, learning rate {train['learning_rate']:g}, "
        f"{numbers['adapter'].get('steps')} steps over {numbers['dataset'].get('rows_train')} rows"
        f"{f' and {replayed} replay rows' if replayed else ''}"
        f"{f', from the adapter of {plan.start.version} on' if plan.start else ''}. "
        f"{_merged_form(facts)}"
        "`recipe.json` lists every setting and content pin, `sbom.json` the software."
    )


def _merged_form(facts: VersionFacts) -> str:
    """Say which form of the adapter ships; older merges do not."""
    numbers = facts.numbers.get("model", {})
    if numbers.get("rank") is None or "strength" not in numbers:
        return ""
    count = numbers.get("adapters", 1)
    adapter = f"The mean of this run's adapter and of {count - 1} earlier versions'" if count > 1 else "The adapter"
    reduced = ", with its intruder dimensions scaled down" if numbers.get("reduced_intruders") else ""
    verb = "is served over" if facts.is_alone else "was merged into"
    place = "" if "adapter" not in facts.config.parts else "; `adapter/` holds it in this form"
    return (
        f"{adapter} {verb} the {numbers.get('base')} base with rank {numbers['rank']} at strength "
        f"{numbers['strength']:g}{reduced}{place}. "
    )


def _with_interval(numbers: dict[str, Any], name: str) -> str:
    value, low, high = (numbers.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    return _number(value) + (f" ({_number(low)} to {_number(high)})" if low is not None and high is not None else "")


def _number(value: Any) -> str:
    # A bool is an int in Python, and a rule without a number shows a dash.
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value or "-")
