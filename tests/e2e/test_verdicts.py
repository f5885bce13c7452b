"""Verdicts of whole runs: real training on data with a known outcome, and a look at production after each run.

Evaluation rows always have the right label. Wrong labels are only in the rows that are trained on.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.lm import conversations

pytestmark = pytest.mark.slow

PHRASES = {
    "refund": "I want my money back for order",
    "delivery": "where is the parcel of order",
    "login": "I cannot sign in to see order",
    "invoice": "please send the bill of order",
    "broken": "it came in pieces, order",
    "cancel": "do not ship it any more, order",
}
SETTINGS = {
    "allow_first_release": True,
    "min_gain_over_base": 0.1,
    "max_loss_to_champion": 0.1,
    "min_slice_prompts": 6,
    "bootstrap_samples": 500,
}
LabelNames = Callable[[str], str]  # the label that a training row gets in place of its own


def swapped(*labels: str) -> LabelNames:
    """Make training rows confuse labels in a circle: each gets the next one's name."""
    wrong = dict(zip(labels, labels[1:] + labels[:1], strict=True))
    return lambda label: wrong.get(label, label)


def write_rows(path: Path, answer_for: LabelNames, per_label: int = 60) -> None:
    lines = []
    for label, phrase in PHRASES.items():
        for i in range(per_label):
            user = {"role": "user", "content": f"{phrase} number {1000 + i}"}
            # The rows above the line's `eval_fraction` of 0.2 are trained on.
            digest = hashlib.sha256(f"tiny\n{conversations.normalized_text([user])}".encode()).digest()
            is_trained_on = int.from_bytes(digest[:8], "big") / 2**64 >= 0.2
            answer = {"role": "assistant", "content": answer_for(label) if is_trained_on else label}
            lines.append(json.dumps({"messages": [user, answer]}) + "\n")
    path.write_text("".join(lines))


def production(project: Any) -> Any:
    path = project.folder / "store/models/tiny/aliases/production.json"
    return json.loads(path.read_text())["version"] if path.exists() else None


def manifest(project: Any, version: str) -> Any:
    return json.loads((project.folder / f"store/models/tiny/versions/{version}/manifest.json").read_text())


def evaluation(project: Any) -> Mapping[str, Any]:
    """Read the newest evaluation; `passed` has its rules by name."""
    paths = (project.folder / "store/artifacts/evaluation").glob("*/*/evaluation.json")
    document = json.loads(max(paths, key=lambda p: p.stat().st_mtime).read_text())
    return {**document, "passed": {rule["name"]: rule["passed"] for rule in document["rules"]}}


@pytest.mark.timeout(1800)
def test_five_challengers_get_five_right_verdicts(make_project: Callable[..., Any]) -> None:
    # The rows differ by their numbers alone, and their labels are wrong on purpose.
    checks = {"near_evaluation": "off", "label_errors": "off"}
    project = make_project(evaluate=SETTINGS, train={"epochs": 6}, data={"checks": checks})

    def run(exit_code: int, why: str, answer_for: LabelNames, *overrides: str) -> None:
        write_rows(project.folder / "tickets.jsonl", answer_for)
        result = project.run(*(f"--set={override}" for override in overrides))
        assert result.exit_code == exit_code, f"{why}: {result.text[-3000:]}"

    # The champion learns three of the six labels wrong.
    half = swapped("invoice", "broken", "cancel")
    run(0, "a champion", half)
    champion = production(project)
    assert evaluation(project)["contestants"]["challenger"]["accuracy"] == pytest.approx(0.5, abs=0.1)

    draw = random.Random(0)
    run(11, "labels at random", lambda _: draw.choice(list(PHRASES)))
    report = evaluation(project)
    assert (report["verdict"], report["passed"]["gain_over_base"], report["passed"]["loss_to_champion"]) == (
        "refuse", False, False)  # fmt: skip
    assert production(project) == champion

    run(11, "better overall, but broken on two labels", swapped("refund", "delivery"))
    report = evaluation(project)
    assert report["contestants"]["challenger"]["accuracy"] > report["contestants"]["champion"]["accuracy"] + 0.1
    assert [name for name, passed in report["passed"].items() if not passed] == ["slices"]
    assert {s["name"] for s in report["slices"][:2]} == {"label=refund", "label=delivery"}
    assert production(project) == champion

    run(0, "as good as the champion", half, "train.seed=1")
    report = evaluation(project)
    assert abs(report["contestants"]["challenger"]["accuracy"] - report["contestants"]["champion"]["accuracy"]) < 0.05
    equal = production(project)
    assert equal != champion
    assert manifest(project, equal)["anchor"] == champion, "an equal version is not the best so far"

    run(0, "better", lambda label: label)
    report = evaluation(project)
    assert set(report["contestants"]) == {"base", "base_nf4", "challenger", "champion", "anchor"}
    better = production(project)
    assert better not in (champion, equal)
    assert manifest(project, better)["anchor"] == better

    run(10, "an empty evaluation set ends at the data gate", lambda label: label, "data.eval_fraction=1e-9")
    assert production(project) == better
