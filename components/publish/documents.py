"""Write the documents of a version: model card, recipe and software bill of materials.

They are published, so none of them may hold a URI of the store or of a source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from components.publish import markdown
from components.publish.export_table import export_lines
from qlora_retrain.config.publish import PublishConfig
from qlora_retrain.lm.adapter_scale import describe_adapter, has_scale
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.pipeline.plan import Plan


def recipe(plan: Plan) -> dict[str, Any]:
    """Return everything that determined the version: identity fields, keys of inputs, code hashes and content pins."""
    return {
        "line": plan.line,
        "steps": {s.name: s.identity for s in plan.steps},
        "inputs": {s.name: s.inputs for s in plan.steps},
        "code": {s.name: s.code for s in plan.steps},
        "sources": {n: {f.path: f.pin for f in p.files} if p else None for n, p in plan.sources.items()},
        "champion": plan.champion.version if plan.champion else None,
        "anchor": plan.anchor.version if plan.anchor else None,
        # Later plans of the line read the start, to pin it again where there is no new data.
        "start": plan.start.model_dump() if plan.start else None,
        "earlier_adapters": [adapter.model_dump() for adapter in plan.earlier_adapters],
    }


def sbom(plan: Plan, version: str) -> dict[str, Any]:
    """Return the software bill of materials (CycloneDX 1.5): the pinned packages and the base model."""
    # Read from constraints.txt, which also enters the code hash, and not from this environment: publish runs in the
    # light image, where the packages that trained the model are not installed.
    pins = (project_root() / "constraints.txt").read_text()
    packages = sorted(
        re.findall(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", pins, flags=re.MULTILINE), key=lambda p: p[0].lower()
    )
    libraries = [
        {"type": "library", "name": name, "version": pinned, "purl": f"pkg:pypi/{name.lower()}@{pinned}"}
        for name, pinned in packages
    ]

    base = plan.sources["base_model"]
    assert base is not None
    model = {
        "type": "machine-learning-model",
        "name": "base_model",
        "version": base.key()[:12],
        # Only files whose SHA-256 the plan computed, since an ETag or a commit is another kind of pin.
        "hashes": [
            {"alg": "SHA-256", "content": f.pin.removeprefix("sha256:")} for f in base.files if f.pin[:7] == "sha256:"
        ],
    }

    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "machine-learning-model", "name": plan.line, "version": version}},
        "components": [model, *libraries],
    }


def model_card(
    config: PublishConfig,
    plan: Plan,
    version: str,
    verdict: Mapping[str, Any],
    numbers: Mapping[str, Mapping[str, Any]],
    certificate: Mapping[str, Any],
    *,
    is_alone: bool = False,
) -> str:
    """Return the model card: what the version is, how it was evaluated, and how to use it.

    With `is_alone`, the version is an adapter without a model.
    """
    train = plan.step("train_qlora").identity
    rule_rows = [
        markdown.row(
            r["name"],
            _number(r.get("value")),
            f"{_number(r.get('low'))} to {_number(r.get('high'))}",
            _number(r.get("limit")),
            "not measured" if not r.get("is_measured", True) else "yes" if r["passed"] else "no",
        )
        for r in verdict["rules"]
    ]
    contestant_rows = [
        markdown.row(name, _number(c.get("accuracy")), _number(c.get("macro_f1")), _number(c.get("loss")))
        for name, c in verdict["contestants"].items()
    ]

    replayed = numbers["dataset"].get("rows_replay")
    champion = plan.champion.version if plan.champion else "none: this is the line's first"
    base_format = plan.step("quantize_model").identity.get("format", "nf4")
    has_16_bits = base_format == "none"
    base_bits = {"none": "16-bit", "mixed": "4- and 8-bit"}.get(base_format, "4-bit")
    challenger = f"{base_bits} base with its adapter"
    recipe_text = (
        f"{'LoRA' if has_16_bits else 'QLoRA'}: {describe_adapter(train['rank'], train['alpha'], train['method'])}"
    )
    if train["method"] == "full":
        challenger, recipe_text = "trained model", "Full fine-tuning: all weights trained, without an adapter"
    elif not has_scale(train["method"]):
        recipe_text = f"{train['method']}: {describe_adapter(train['rank'], None, train['method'])}"
    form = "the merged form in `model/`, the form to run"
    if is_alone:
        form = "the adapter in `adapter/` over the base that `model/base.json` names, the form to run"
    return "\n".join(
        [
            markdown.front_matter(config),
            f"# {plan.line} {version}",
            "",
            markdown.paragraph(config.description) or "A fine-tuned language model.",
            "",
            f"**Verdict:** {markdown.inline(verdict['sentence'])}",
            "",
            "| rule | value | interval | limit | passed |",
            "|---|---|---|---|---|",
            *rule_rows,
            "",
            "| contestant | accuracy | macro-F1 | loss (nats per token) |",
            "|---|---|---|---|",
            *contestant_rows,
            "",
            *_ending_lines(verdict),
            f"Compared with the version in production: {champion}. The numbers above are those of the {challenger}. "
            f"`evaluation/certificate.json` has those of {form}.",
            "",
            *export_lines(certificate),
            "## How it was made",
            "",
            f"{recipe_text}, learning rate {train['learning_rate']:g}, "
            f"{numbers['adapter'].get('steps')} steps over {numbers['dataset'].get('rows_train')} rows"
            f"{f' and {replayed} replay rows' if replayed else ''}"
            f"{f', from the adapter of {plan.start.version} on' if plan.start else ''}. "
            f"{_merged_form(numbers.get('model', {}))}"
            "`recipe.json` lists every setting and content pin, `sbom.json` the software.",
            "",
            "## How to use it",
            "",
            *_usage_lines(plan, is_alone=is_alone),
        ]
    )


def _merged_form(numbers: Mapping[str, Any]) -> str:
    """Say what was merged; older merges do not."""
    if numbers.get("rank") is None or "strength" not in numbers:
        return ""
    count = numbers.get("adapters", 1)
    merged = f"The mean of this run's adapter and of {count - 1} earlier versions'" if count > 1 else "The adapter"
    reduced = ", with its intruder dimensions scaled down" if numbers.get("reduced_intruders") else ""
    return (
        f"{merged} was merged into the {numbers.get('base')} base with rank {numbers['rank']} at strength "
        f"{numbers['strength']:g}{reduced}; `adapter/` holds it in this form. "
    )


def _ending_lines(verdict: Mapping[str, Any]) -> list[str]:
    """Say how many answers ended by themselves, for a reader who looks at no table; older evaluations do not."""
    texts = [r["text"] for r in verdict["rules"] if r["name"] == "answers_end"]
    return [f"Ends of answers: {markdown.inline(text)}." for text in texts[:1]] + ([""] if texts else [])


def _usage_lines(plan: Plan, *, is_alone: bool) -> list[str]:
    data = plan.step("validate_data").identity
    base = plan.sources["base_model"]
    source = f": `{base.uri}`" if base and base.is_commit else ""
    lines = [
        f"This version is an adapter alone: it changes no weight of its base model, and is used over it{source}. "
        "`model/base.json` has the hashes of the base's files, and `model/` the tokenizer. `qlora-retrain ask VERSION "
        "--base FOLDER QUESTION` checks the hashes and answers.",
        "",
    ]
    if not is_alone:
        lines = [
            "`model/` is a plain transformers folder: `AutoModelForCausalLM.from_pretrained('model')`. Its "
            "`generation_config.json` lists every token at which an answer ends.",
            "",
        ]
    if data["system"]:
        lines += ["It was trained with this system turn:", "", markdown.code_block(data["system"]), ""]
    if variables := data.get("template_kwargs"):
        arguments = json.dumps(variables, ensure_ascii=False)
        lines += [
            "It was trained with these variables of the chat template, as arguments of `apply_chat_template`:",
            "",
            markdown.code_block(arguments),
            "",
        ]
    return lines


def _number(value: Any) -> str:
    # A bool is an int in Python, and a rule without a number shows a dash.
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value or "-")
