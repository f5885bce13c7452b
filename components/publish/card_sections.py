"""The sections of a model card about the data, the adapter over its bases, the cost, the limits and the licences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from components.publish import markdown
from components.publish.facts import Document, VersionFacts
from components.publish.usage import OVER_OWN_BASE
from qlora_retrain.pipeline import cost

_SPLITS = ("train", "eval", "golden")
_NAMES = {"train": "training", "eval": "evaluation", "golden": "golden (kept by hand)"}
_MAX_NAMES = 30  # of labels


def data_lines(facts: VersionFacts) -> list[str]:
    """Summarise the data without the text of any row."""
    rows, prompts = facts.profile.get("rows"), facts.profile.get("prompts")
    if not isinstance(rows, dict) or not isinstance(prompts, dict):
        return []
    lines = ["## Data", "", "| rows | number | prompts | tokens | longest |", "|---|---|---|---|---|"]
    for split in _SPLITS:
        lengths: Document = facts.profile.get(split) or {}
        cells = (rows.get(split), prompts.get(split), lengths.get("tokens"), lengths.get("tokens_p100"))
        lines.append(markdown.row(_NAMES[split], *(_whole(cell) for cell in cells)))
    left_out = {name: rows.get(name) for name in ("quarantined", "duplicates") if rows.get(name)}
    lines += ["", f"Of {_whole(rows.get('read'))} rows, {_listed(left_out) or 'none'} were kept out."]
    labels = (facts.profile.get("labels") or {}).get("rows") or {}
    if labels:
        names = ", ".join(markdown.inline(str(name)) for name in list(labels)[:_MAX_NAMES])
        lines += ["", f"It answers with one of {len(labels)} labels: {names}{', ...' * (len(labels) > _MAX_NAMES)}."]
    if languages := facts.profile.get("languages"):
        lines += ["", f"Languages, by rows: {', '.join(f'{code} {count}' for code, count in languages.items())}."]
    return [*lines, "", "`data/profile.json` and `reports/data.html` have the rest; no row is in this version.", ""]


def served_lines(facts: VersionFacts) -> list[str]:
    """Say what the adapter is worth without merging, over either base, as vLLM and others serve it."""
    if facts.train["method"] == "full" or "adapter" not in facts.config.parts:
        return []
    forms = (facts.certificate.get("forms") or {}).get("certification") or {}
    served: dict[str, Document] = dict(facts.certificate.get("served_adapter") or {})
    title_16_bits = "16 bits"
    if not served and _is_adapter_as_trained(facts.certificate) and "live" in forms:
        is_packed = facts.plan.step("quantize_model").identity.get("format") != "none"
        served = {"packed" if is_packed else "original": forms["live"]}
        # The same sum, rounded to 16 bits.
        if is_packed and "original" in forms and facts.train["method"] not in OVER_OWN_BASE:
            served["original"], title_16_bits = forms["original"], "16 bits, merged into it"
    lines = [
        "## The adapter over its base, not merged",
        "",
        f"On the rows that certify, with intervals of {facts.confidence:.0%}:",
        "",
        "| base | accuracy | loss (nats per token) |",
        "|---|---|---|",
    ]
    for name, title in (("original", title_16_bits), ("packed", _packed_name(facts))):
        if title:
            numbers = served.get(name) or {}
            lines.append(markdown.row(title, _measured(numbers, "accuracy"), _measured(numbers, "loss")))
    return [*lines, ""]


def cost_lines(facts: VersionFacts) -> list[str]:
    """Show what the version cost, by step and in all."""
    costs = cost.from_document(facts.cost)
    if not costs:
        return []
    rows = [markdown.row(*map(str, row)) for row in cost.rows(costs, facts.plan.run_id)]
    heads = [markdown.row(*cost.HEADERS), "|" + "---|" * len(cost.HEADERS)]
    note = f"{'; '.join(facts.cost.get('notes') or ())}. `cost.json` has the same numbers."
    return ["## What it cost", "", *heads, *rows, "", note[0].upper() + note[1:], ""]


def ending_lines(facts: VersionFacts) -> list[str]:
    """Name the tokens at which an answer ends."""
    if not facts.stop_ids:
        return []
    names = (facts.profile.get("chat") or {}).get("generation_stops_at") or []
    tokens = f" ({', '.join(markdown.inline(str(name)) for name in names)})" if names else ""
    ids = ", ".join(map(str, facts.stop_ids))
    return [f"Generation ends at the token ids {ids}{tokens}; stop at each of them.", ""]


def limit_lines(facts: VersionFacts) -> list[str]:
    """Say where nothing is known of the model, from what was trained on and what was measured."""
    return ["## Limits", "", *(f"- {limit}" for limit in _limits(facts)), ""]


def _limits(facts: VersionFacts) -> Iterator[str]:
    data = facts.plan.step("validate_data").identity
    yield (
        f"It was trained on chats of at most {data['max_length_tokens']} tokens; what it does with longer ones was not "
        "measured."
    )
    prompts = (facts.profile.get("prompts") or {}).get("eval")
    where = f"{prompts} prompts" if prompts else "the evaluation rows"
    yield f"Its quality is known on {where} of this line's data, and on no other task."
    if languages := facts.profile.get("languages"):
        yield f"Other languages than {', '.join(languages)} were neither trained nor evaluated."
    rules = facts.verdict.get("rules") or []
    if unmeasured := [markdown.inline(rule["name"]) for rule in rules if not rule.get("is_measured", True)]:
        yield f"Not measured: {', '.join(unmeasured)}."
    if not any(rule["name"].startswith("forgetting") for rule in rules):
        yield "What it forgot of its base's abilities was not measured."
    for warning in facts.certificate.get("serving_warnings") or []:
        yield markdown.inline(str(warning))


def licence_lines(facts: VersionFacts) -> list[str]:
    """Name the licence of the model, and where those of its parts stand."""
    base = f"[{facts.base_id.repository}]({facts.base_id.page})" if facts.base_id else "the base model"
    return [
        "## Licences",
        "",
        f"The model: {markdown.inline(markdown.licence_text(facts.config))}. Its base has terms of its own, which hold "
        f"for it too: see {base}. `sbom.json` lists the software with its licences.",
        "",
    ]


def _is_adapter_as_trained(certificate: Document) -> bool:
    """Return whether the adapter that ships is the one that was evaluated, and no averaged, cut or weakened form."""
    is_whole = certificate.get("form") in ("original", "dequantized")
    return is_whole and certificate.get("strength", 1) == 1 and not certificate.get("reduced_intruders")


def _packed_name(facts: VersionFacts) -> str:
    base_format = facts.plan.step("quantize_model").identity.get("format", "nf4")
    return "" if base_format == "none" else f"packed ({base_format})"


def _measured(numbers: Document, name: str) -> str:
    value, low, high = (numbers.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return "-" if numbers else "not measured"
    return f"{value:.4f}" + (f" ({low:.4f} to {high:.4f})" if low is not None and high is not None else "")


def _whole(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


def _listed(counts: Document) -> str:
    names: Sequence[str] = [f"{count:,} {name}" for name, count in counts.items()]
    return " and ".join(names)
