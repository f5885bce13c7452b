"""What a version says of itself: its card as the Hub's own library reads it, its bill of materials, and its cost."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard

from components.publish.base_model import BaseId, find
from components.publish.documents import recipe
from components.publish.facts import VersionFacts
from components.publish.model_card import model_card
from components.publish.sbom import sbom
from components.publish.usage import WITHOUT_PEFT
from qlora_retrain.config.methods import METHODS
from qlora_retrain.config.sections import PublishConfig
from qlora_retrain.core import graph
from qlora_retrain.pipeline import cost, make_plan
from qlora_retrain.pipeline.cost import StepCost
from qlora_retrain.pipeline.plan import Plan

COMMIT = "1" * 40
FORM = {
    "path": ".", "size_bytes": 2**20, "loss": 0.17, "loss_low": 0.1, "loss_high": 0.26, "accuracy": 0.828125,
    "accuracy_low": 0.7179, "accuracy_high": 0.9012, "macro_f1": 0.83, "macro_f1_low": 0.7, "macro_f1_high": 0.91,
    "rows": 64, "prompts": 64, "kl": 0.01, "cost": 0.02, "notes": [],
}  # fmt: skip
PROFILE = {
    "rows": {"read": 777, "train": 639, "eval": 127, "golden": 36, "quarantined": 6, "duplicates": 2},
    "prompts": {"train": 639, "eval": 127, "golden": 36},
    "train": {"tokens": 39385, "tokens_p100": 96},
    "labels": {"rows": {"refund": {}, "login <b>": {}}},
    "languages": {"en": 765},
    "chat": {"generation_stops_at": ["<|im_end|>"]},
}
CERTIFICATE = {
    "form": "dequantized",
    "strength": 1.0,
    "exports": {"bf16": FORM},
    "forms": {"certification": {"live": {"loss": 0.15, "accuracy": 0.83, "accuracy_low": 0.7, "accuracy_high": 0.9}}},
    "serving_warnings": ["vLLM: modules_to_save is refused"],
}


def facts(plan: Plan, **changes: Any) -> VersionFacts:
    """A version of which everything is known."""
    verdict = {
        "sentence": "passed 8 rules",
        "rules": [{"name": "forgetting", "value": 0.1, "limit": 0.2, "passed": True, "is_measured": False}],
        "contestants": {"challenger": {"loss": 1.0, "accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95}},
        "settings": {"confidence": 0.9},
    }
    costs = {
        "quantize_model": StepCost(run_id="earlier", seconds=10.0, peak_memory_mib=900),
        "train_qlora": StepCost(
            run_id=plan.run_id, seconds=100.0, gpus=2, gpu_seconds=200.0, tokens=26482, peak_memory_mib=700,
            peak_gpu_memory_mib=8000, energy_wh=12.5,
        ),
    }  # fmt: skip
    fields = {
        "config": PublishConfig(licence="Apache-2.0", description="Sorts tickets."),
        "plan": plan,
        "version": "20260131T000000Z-0123456789ab",
        "verdict": verdict,
        "numbers": {"adapter": {"steps": 110}, "dataset": {"rows_train": 639}},
        "certificate": CERTIFICATE,
        "profile": PROFILE,
        "stop_ids": [2, 7],
        "cost": cost.as_document(costs, plan.run_id),
        "base_id": BaseId("HuggingFaceTB/SmolLM2-135M-Instruct", COMMIT),
    }
    return VersionFacts(**{**fields, **changes})


def test_the_hubs_own_library_reads_the_card(made_plan: Plan) -> None:
    card = ModelCard(model_card(facts(made_plan)))
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert (data.base_model, data.base_model_relation) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "finetune")
    assert (data.language, data.tags) == (["en"], ["qlora-retrain", "lora"])
    assert data.metrics == ["loss", "accuracy", "f1"]

    # The metrics are those of the form that ships, each with its interval.
    assert data.model_name == "intents"
    results = {result.metric_type: result for result in data.eval_results or []}
    assert results["accuracy"].metric_value == 0.828125
    assert results["accuracy"].metric_name == "accuracy (90% interval 0.7179 to 0.9012)"
    assert results["f1"].metric_name == "macro_f1 (90% interval 0.7 to 0.91)"
    assert results["loss"].dataset_name == "evaluation rows of intents"
    # What the library writes again is what it has read.
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()


def test_the_card_tells_data_ends_limits_cost_and_licences(made_plan: Plan) -> None:
    text = model_card(facts(made_plan))
    assert "| training | 639 | 639 | 39,385 | 96 |" in text
    assert "Of 777 rows, 6 quarantined and 2 duplicates were kept out." in text
    assert "one of 2 labels: refund, login \\<b\\>." in text
    assert "Generation ends at the token ids 2, 7 (\\<\\|im\\_end\\|\\>)" in text.replace("im_end", "im\\_end")
    assert "- Not measured: forgetting." in text
    assert "- Other languages than en were neither trained nor evaluated." in text
    assert "modules_to_save is refused" in text
    assert "[HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)" in text
    # Of the adapter without merging, what was measured and what was not.
    assert "| 16 bits | not measured | not measured |" in text
    assert "| packed (nf4) | 0.8300 (0.7000 to 0.9000) | 0.1500 |" in text.replace("\\(", "(").replace("\\)", ")")

    # Where both bases were tried, the other one has the same sum.
    forms = CERTIFICATE["forms"]["certification"] | {"original": {"loss": 0.2, "accuracy": 0.75}}  # type: ignore[index]
    both = facts(made_plan, certificate={**CERTIFICATE, "forms": {"certification": forms}})
    assert "| 16 bits, merged into it | 0.7500 | 0.2000 |" in model_card(both)

    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "| quantize_model | earlier | 10 | 0 | - | 900 | - | not measured |" in rows
    assert "| train_qlora | this run | 100 | 200 | 26,482 | 700 | 8,000 | 12.5 |" in rows
    assert "| this run | 1 of 2 steps | 100 | 200 | 26,482 | 700 | 8,000 | 12.5 |" in rows
    assert "| this version in all |  | 110 | 200 | 26,482 | 900 | 8,000 | 12.5 |" in " ".join(rows).replace(
        "|   |", "|  |"
    )


def test_an_adapter_alone_is_one_for_the_hub_too_and_is_measured_over_both_bases(made_plan: Plan) -> None:
    served = {"original": {"loss": 0.2, "accuracy": 0.8}, "packed": {"loss": 0.15, "accuracy": 0.9}}
    certificate = {**CERTIFICATE, "exports": {"adapter": {**FORM, "accuracy": 0.8}}, "served_adapter": served}
    config = PublishConfig(parts=["adapter"])
    alone = facts(made_plan, is_alone=True, certificate=certificate, config=config)
    card = ModelCard(model_card(alone))
    assert (card.data.library_name, card.data.base_model_relation) == ("peft", "adapter")
    assert {r.metric_type: r.metric_value for r in card.data.eval_results or []}["accuracy"] == 0.8
    text = str(card)
    assert "| 16 bits | 0.8000 | 0.2000 |" in text
    assert "| packed (nf4) | 0.9000 | 0.1500 |" in text.replace("\\(", "(").replace("\\)", ")")
    assert f'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", revision="{COMMIT}")' in text
    assert 'PeftModel.from_pretrained(base, "adapter")' in text
    assert set(WITHOUT_PEFT) == {name for name, method in METHODS.items() if method.peft == "no"}


def test_where_little_is_known_the_card_says_no_more(made_plan: Plan) -> None:
    bare = facts(made_plan, certificate={}, profile={"rows": 30}, stop_ids=[], cost={}, base_id=None)
    card = ModelCard(model_card(bare))
    assert "base_model" not in card.data.to_dict()
    assert {r.metric_type: r.metric_value for r in card.data.eval_results or []} == {"loss": 1.0, "accuracy": 0.9}
    assert "## Data" not in str(card)
    assert "## What it cost" not in str(card)
    assert "Generation ends" not in str(card)


def test_the_base_is_named_by_its_source_or_by_the_line(made_plan: Plan) -> None:
    assert find(PublishConfig(), made_plan) is None  # a folder of this machine
    assert find(PublishConfig(base_model_id="acme/base"), made_plan) == BaseId("acme/base")
    base = made_plan.sources["base_model"]
    assert base is not None
    on_the_hub = base.model_copy(update={"uri": f"hf://acme/base@{COMMIT}"})
    plan = made_plan.model_copy(update={"sources": {**made_plan.sources, "base_model": on_the_hub}})
    assert find(PublishConfig(), plan) == BaseId("acme/base", COMMIT)
    assert find(PublishConfig(base_model_id="other/copy"), plan) == BaseId("other/copy")


def test_the_bill_of_materials_names_base_data_and_packages(made_plan: Plan) -> None:
    document = sbom(facts(made_plan))
    assert document == sbom(facts(made_plan))  # a retry writes the same
    components = {component["name"]: component for component in document["components"]}
    base = components["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert (base["type"], base["version"]) == ("machine-learning-model", COMMIT)
    assert base["purl"] == f"pkg:huggingface/HuggingFaceTB/SmolLM2-135M-Instruct@{COMMIT}"
    source = made_plan.sources["raw_data"]
    assert source is not None
    (file,) = components["raw_data"]["components"]
    assert (components["raw_data"]["type"], file["name"]) == ("data", "tickets.jsonl")
    assert file["hashes"] == [{"alg": "SHA-256", "content": source.files[0].pin.removeprefix("sha256:")}]

    torch = components["torch"]
    assert torch["purl"] == f"pkg:pypi/torch@{torch['version']}"
    pydantic = components["pydantic"]
    if metadata.version("pydantic") == pydantic["version"]:
        assert pydantic["licenses"] == [{"expression": "MIT"}]
    if metadata.version("torch").startswith(f"{torch['version']}+"):  # a build for the CPU alone, say
        assert torch["licenses"] == [{"expression": metadata.metadata("torch")["License-Expression"]}]
    model = document["metadata"]["component"]
    assert model["licenses"] == [{"expression": "Apache-2.0"}]
    metrics = {m["type"]: m for m in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    assert metrics["accuracy"]["confidenceInterval"] == {"lowerBound": "0.7179", "upperBound": "0.9012"}
    # Every reference is one to a component of the document.
    names = {component["bom-ref"] for component in document["components"] if "bom-ref" in component} | {"model"}
    assert {ref for entry in document["dependencies"] for ref in (entry["ref"], *entry["dependsOn"])} <= names


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ({"licence": "MIT OR Apache-2.0"}, {"expression": "MIT OR Apache-2.0"}),
        ({"licence": "llama3.1"}, {"license": {"name": "llama3.1"}}),
        ({"licence": "other", "licence_name": "Acme: |x| #1"}, {"license": {"name": "Acme: |x| #1"}}),
        ({}, {"license": {"name": "unknown"}}),
    ],
)
def test_the_bill_of_materials_is_valid_by_the_schema_of_cyclonedx(
    made_plan: Plan, licence: dict[str, str], expected: dict[str, Any]
) -> None:
    document = sbom(facts(made_plan, config=PublishConfig(**licence)))
    assert JsonStrictValidator(SchemaVersion.V1_5).validate_str(json.dumps(document)) is None
    # What SPDX knows is written as SPDX writes it, so that programs can compare it.
    assert document["metadata"]["component"]["licenses"] == [expected]


@pytest.mark.parametrize("overrides", [[], ["publish.parts=[adapter]", "train.method=rslora", "data.system='a: b'"]])
def test_a_recipe_is_a_lines_file_that_trains_the_same_again(line: Path, root_uri: str, overrides: list[str]) -> None:
    plan = make_plan.make_plan(line, root_uri, overrides=overrides)
    steps = json.loads(json.dumps(recipe(plan)))["steps"]
    sections = {step.section: steps[step.name] for step in graph.STEPS}
    again = line.parent / "again.yaml"
    sources = {"raw_data": "tickets.jsonl", "base_model": "base"}
    again.write_text(json.dumps({"line": "intents", "sources": sources, **sections}))
    assert {s.name: s.key for s in make_plan.make_plan(again, root_uri).steps} == {s.name: s.key for s in plan.steps}
