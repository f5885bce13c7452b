"""Every attack on a store with keys is run for real; docs/security.md has what happened, word for word.

Set `WRITE_ATTACKS=1` to write the table there again.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.config.line import load
from qlora_retrain.core.errors import QualityRefused
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import execute, explain, policies
from qlora_retrain.runtimes.airflow import params
from qlora_retrain.storage import artifact, audit, key_admin, open_store, registry
from tests.attacks.attacker import LINE, RUN, Attacker, answer, forge_done, outcome, sha256
from tests.policies import is_allowed

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
BEGIN, END = "<!-- attacks: begin -->\n", "<!-- attacks: end -->\n"
Attack = Callable[[Attacker], str]
ATTACKS: list[tuple[str, str, Attack]] = []


def attack(prefix: str, deed: str) -> Callable[[Attack], Attack]:
    """Add an attack by whoever may write to a prefix, or has a key."""

    def add(function: Attack) -> Attack:
        ATTACKS.append((prefix, deed, function))
        return function

    return add


@attack("`runs/`", "plants a plan of its own before task 0 of a run that it can foresee")
def plant_plan(a: Attacker) -> str:
    document = a.document(f"runs/{a.plan().run_id}/plan.json") | {"run_id": RUN}
    a.write(f"runs/{RUN}/plan.json", document)
    return outcome("task 0", lambda: a.plan(RUN).run_id)


@attack("`runs/`", "plants a whole plan, signed with a key of its own")
def plant_signed_plan(a: Attacker) -> str:
    path = f"runs/{RUN}/plan.json"
    document = a.document(f"runs/{a.plan().run_id}/plan.json") | {"run_id": RUN}
    a.write(path, a.sign(path, document, a.own_key(), "planner"))
    return outcome("task 0", lambda: a.plan(RUN).run_id)


@attack("`runs/`", "changes the learning rate in a plan (recorded 2e-4, trained at 0.9)")
def change_config(a: Attacker) -> str:
    plan = a.plan(text="{}")
    path = f"runs/{plan.run_id}/plan.json"
    document = a.document(path)
    document["steps"][2]["config"]["learning_rate"] = 0.9
    a.write(path, document)
    return a.run(plan.uri, "train_qlora")


@attack("`runs/`", "changes a plan to another line, so that `publish` moves that line's alias")
def change_line(a: Attacker) -> str:
    plan = a.plan(text="{}")
    a.run_until(plan, "publish")
    path = f"runs/{plan.run_id}/plan.json"
    a.write(path, a.document(path) | {"line": "victim"})
    # With the hash of the changed plan: an orchestrator that was deceived, too.
    uri = f"{plan.uri.partition('#')[0]}#sha256={sha256(a.folder / path)}"
    return a.run(uri, "publish")


@attack("`runs/`", "copies the signed plan of an older run to a new one")
def replay_plan(a: Attacker) -> str:
    document = a.document(f"runs/{a.plan().run_id}/plan.json")
    a.write(f"runs/{RUN}/plan.json", document)
    return outcome("task 0", lambda: a.plan(RUN).run_id)


@attack("`runs/`", "replaces a step's log and its ending")
def replace_log(a: Attacker) -> str:
    plan = a.plan(text="{}")
    a.write(f"runs/{plan.run_id}/endings/validate_data.json", {"code": 0})
    a.write(f"runs/{plan.run_id}/logs/validate_data/x.log", "all is well")
    return a.run(plan.uri, "validate_data")


@attack("`artifacts/`", "turns a refusal into a success by one word of its manifest")
def turn_refusal(a: Attacker) -> str:
    plan = a.plan(text="{}")
    a.run_until(plan, "evaluate")
    run = a.steps["evaluate"]

    def refuse(**arguments: Any) -> StepResult:
        return StepResult(run(**arguments).numbers, refused=QualityRefused("worse than production"))

    refuse.__signature__ = inspect.signature(run)  # type: ignore[attr-defined]
    assert execute.run_step(plan, "evaluate", lambda: refuse).code == 11
    manifest = artifact.find_manifest(open_store(a.root), "evaluation", plan.step("evaluate").key)
    assert manifest is not None
    a.write(a.manifest_path(plan, "evaluate"), forge_done(manifest))
    return a.run(plan.uri, "merge_adapter")


@attack("`artifacts/`", "plants an evaluation before `evaluate` runs, signed with a key of its own")
def plant_evaluation(a: Attacker) -> str:
    old, plan = a.first, a.plan(text="{}")
    a.run_until(plan, "evaluate")
    document = a.document(a.manifest_path(old, "evaluate")) | {"key": plan.step("evaluate").key}
    path = a.manifest_path(plan, "evaluate")
    a.write(path, a.sign(path, document, a.own_key(), "evaluate"))
    return a.run(plan.uri, "evaluate")


@attack("`artifacts/`", "copies a signed evaluation to the key of another adapter")
def replay_evaluation(a: Attacker) -> str:
    old, plan = a.first, a.plan(text="{}")
    a.run_until(plan, "evaluate")
    document = a.document(a.manifest_path(old, "evaluate")) | {"key": plan.step("evaluate").key}
    a.write(a.manifest_path(plan, "evaluate"), document)
    return a.run(plan.uri, "evaluate")


@attack("`artifacts/`", "changes a byte of the model, of the same size, after it was judged")
def change_model(a: Attacker) -> str:
    plan = a.plan(text="{}")
    a.run_until(plan, "publish")
    manifest = a.document(a.manifest_path(plan, "merge_adapter"))
    path = a.folder / f"artifacts/model/{manifest['key']}/{manifest['attempt']}/model.safetensors"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.unlink()
    path.write_bytes(data)
    return a.run(plan.uri, "publish")


@attack("`scratch/`", "plants a finished checkpoint, so that nothing is trained and its adapter is taken")
def plant_checkpoint(a: Attacker) -> str:
    plan = a.plan(text="{}")
    a.run_until(plan, "train_qlora")
    folder = f"scratch/train_qlora/{plan.step('train_qlora').key}/0123456789ab/checkpoint-300"
    a.write(f"{folder}/adapter_model.safetensors", "forged")
    file = a.folder / folder / "adapter_model.safetensors"
    entry = {"path": file.name, "size": file.stat().st_size, "sha256": sha256(file)}
    a.write(f"{folder}/_complete.json", {"step": 300, "files": [entry]})
    restored: list[str] = []
    run = a.steps["train_qlora"]

    def train(**arguments: Any) -> StepResult:
        restored.extend(path.name for path in arguments["scratch"].iterdir())
        return run(**arguments)

    train.__signature__ = inspect.signature(run)  # type: ignore[attr-defined]
    assert execute.run_step(plan, "train_qlora", lambda: train).code == 0
    return "`train_qlora` passes it over and trains from the start" if not restored else f"it resumes from {restored}"


@attack("`histories/`", "empties the line's history, so that what was evaluated is trained on")
def empty_history(a: Attacker) -> str:
    plan = a.plan(text="{}")
    assert plan.history is not None
    (a.folder / f"histories/{LINE}/{plan.history.sha256}.txt").write_text("")
    return a.run(plan.uri, "validate_data")


@attack("`histories/`", "plants a record that says that every data set is joined already")
def plant_record(a: Attacker) -> str:
    folder, key = f"histories/{LINE}/datasets", "f" * 64
    (record,) = (a.folder / folder).iterdir()
    document = a.document(f"{folder}/{record.name}") | {"dataset": key, "joined": [a.first.step("validate_data").key]}
    a.write(f"{folder}/29990101T000000Z-{key}.json", document)
    return outcome("task 0", lambda: a.plan(text="{}").run_id)


@attack("`histories/`", "removes all of it")
def remove_histories(a: Attacker) -> str:
    shutil.rmtree(a.folder / "histories")
    return outcome("task 0", lambda: a.plan(text="{}").run_id)


@attack("a stolen key of `train_qlora`", "signs an evaluation and plants it")
def sign_as_another_step(a: Attacker) -> str:
    old, plan = a.first, a.plan(text="{}")
    a.run_until(plan, "evaluate")
    document = a.document(a.manifest_path(old, "evaluate")) | {"key": plan.step("evaluate").key}
    path = a.manifest_path(plan, "evaluate")
    a.write(path, a.sign(path, document, a.stolen_key("train_qlora"), "evaluate"))
    return a.run(plan.uri, "evaluate")


@attack("a stolen key of another line's `publish`", "signs this line's `production`")
def sign_as_another_line(a: Attacker) -> str:
    key_admin.create(open_store(a.root), ["other"])
    path = f"models/{LINE}/aliases/production.json"
    a.write(path, a.sign(path, a.document(path) | {"generation": 9}, a.stolen_key("publish-other"), f"publish-{LINE}"))
    return a.pull()


@attack("`models/<line>/`", "moves `production` to another version, unsigned")
def move_alias(a: Attacker) -> str:
    path = f"models/{LINE}/aliases/production.json"
    document = a.document(path) | {"generation": 9}
    del document["signature"]
    a.write(path, document)
    return a.pull()


@attack("`models/<line>/`", "puts the signed alias of before back")
def replay_alias(a: Attacker) -> str:
    path = f"models/{LINE}/aliases/production.json"
    before = a.document(path)
    publish_next(a)
    a.write(path, before)
    return outcome("task 0", lambda: a.plan().run_id)


@attack("`models/<line>/`", "removes the alias, so that the next run is judged as the first")
def remove_alias(a: Attacker) -> str:
    (a.folder / f"models/{LINE}/aliases/production.json").unlink()
    return outcome("task 0", lambda: a.plan().run_id)


@attack("`models/<line>/`", "copies the signed alias `latest` to `production`")
def copy_alias(a: Attacker) -> str:
    a.write(f"models/{LINE}/aliases/production.json", a.document(f"models/{LINE}/aliases/latest.json"))
    return a.pull()


@attack("`models/<line>/`", "changes a version's manifest and the file that it lists")
def change_version(a: Attacker) -> str:
    version = a.alias().version
    path = f"models/{LINE}/versions/{version}/manifest.json"
    document = a.document(path)
    document["files"][0]["sha256"] = "0" * 64
    a.write(path, document)
    return a.pull()


@attack("`models/<line>/`", "changes a byte of a version before it is promoted")
def change_before_promote(a: Attacker) -> str:
    store, first = open_store(a.root), a.alias().version
    publish_next(a)
    path = a.folder / f"models/{LINE}/versions/{first}/model/model.safetensors"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.unlink()
    path.write_bytes(data)

    def promote() -> str:
        release = registry.read_release(store, LINE, first)
        registry.move_alias(store, LINE, "production", release, reason="back")
        registry.verify_version(store, release)
        return "`promote` copies the file again from its artifact, then moves"

    return outcome("`promote`", promote)


@attack("`models/<line>/`", "plants an audit entry of a later generation, to make the line unusable")
def plant_audit_entry(a: Attacker) -> str:
    state = a.document(f"models/{LINE}/aliases/production.json") | {"generation": 99, "request_id": "0" * 12}
    a.write(f"models/{LINE}/audit/00000099-production-{'0' * 12}.json", state)
    plan = a.plan()
    return "nothing: it is not signed, and no reader believes it" if plan.champion else "the champion is lost"


@attack("`models/<line>/`", "changes who moved the alias, in the audit trail")
def change_audit_entry(a: Attacker) -> str:
    name = next(n for n in open_store(a.root).children(f"models/{LINE}/audit") if "-production-" in n)
    path = f"models/{LINE}/audit/{name}"
    a.write(path, a.document(path) | {"actor": "os:alice@desk"})
    _, (fault,) = audit.history(open_store(a.root), LINE)
    return answer("`history`", 13, fault)


@attack("`models/<line>/`", "removes an entry of the audit trail, between two others")
def remove_audit_entry(a: Attacker) -> str:
    publish_next(a)
    publish_next(a)
    name = next(n for n in open_store(a.root).children(f"models/{LINE}/audit") if n.startswith("00000002-production"))
    (a.folder / f"models/{LINE}/audit/{name}").unlink()
    _, (fault,) = audit.history(open_store(a.root), LINE)
    return answer("`history`", 13, fault)


@attack("a copy of the store", "gives a consumer the version of before, who pulled the newer one")
def old_store(a: Attacker) -> str:
    shutil.copytree(a.folder / "models", a.scratch / "models")
    publish_next(a)
    a.pull("pulled")
    shutil.rmtree(a.folder / "models")
    shutil.copytree(a.scratch / "models", a.folder / "models")
    return a.pull("pulled")


@attack("a copy of the store", "gives it to a new folder, which asks for `--min-generation 2`")
def old_store_new_folder(a: Attacker) -> str:
    return a.pull("new", min_generation=2)


@attack("a forged store", "is complete in itself, for a consumer who gives `--verify-key`")
def forged_store(a: Attacker) -> str:
    return a.pull("new", verify_key="0" * 64)


@attack("a stolen key of `merge_adapter`", "signs other weights as the model that passed")
def sign_other_weights(a: Attacker) -> str:
    plan = a.plan(text="{}")
    a.run_until(plan, "publish")
    path = a.manifest_path(plan, "merge_adapter")
    document = a.document(path)
    file = a.folder / f"artifacts/model/{document['key']}/{document['attempt']}/model.safetensors"
    file.unlink()
    file.write_text("other weights")
    for entry in document["files"]:
        if entry["path"] == file.name:
            entry |= {"size_bytes": file.stat().st_size, "sha256": sha256(file)}
    a.write(path, a.sign(path, document, a.stolen_key("merge_adapter"), "merge_adapter"))
    return f"not stopped: {a.run(plan.uri, 'publish')}"


@attack("a line's YAML", "has a bomb of anchors in 500 bytes")
def yaml_bomb(a: Attacker) -> str:
    anchors = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]\n" for n in range(9))
    a.line.write_text(anchors + a.line.read_text())
    return outcome("task 0", lambda: a.plan().run_id)


@attack("a line's YAML", "names an image and a network of its own")
def own_image(a: Attacker) -> str:
    a.line.write_text(a.line.read_text() + "runtime: {kind: docker, light_image: '{{ conn.store.password }}'}\n")
    return outcome("task 0", lambda: a.plan().run_id)


@attack("a line's YAML", "names a folder outside of the platform's `sources`")
def foreign_source(a: Attacker) -> str:
    a.allow_sources(a.line.parent)
    (a.scratch / "secrets").mkdir()
    (a.scratch / "secrets" / "key.txt").write_text("secret")
    a.line.write_text(a.line.read_text().replace("tickets.jsonl", str(a.scratch / "secrets")))
    return outcome("task 0", lambda: a.plan().run_id)


@attack("a line's YAML", "has a number of 31 digits, which stops Airflow from reading every line")
def long_number(a: Attacker) -> str:
    a.line.write_text(a.line.read_text() + f"train: {{max_steps: {10**30}}}\n")
    return outcome("task 0", lambda: a.plan().run_id)


@attack("a line's YAML", "names a source `s3://*/x`, to have every bucket in the policies of its roles")
def pattern_of_buckets(a: Attacker) -> str:
    a.line.write_text(a.line.read_text().replace("tickets.jsonl", "'s3://*/x'"))
    document = policies.role_policy(load(a.line), "validate_data", "s3://store")
    statements = [s for s in document["Statement"] if s["Sid"] == "ReadSources"]
    is_open = any(is_allowed({"Statement": statements}, "s3:GetObject", f"arn:aws:s3:::{b}/x/y") for b in ("pay", "x"))
    return "every bucket can be read" if is_open else "the policy names a bucket that is called `*`, which none is"


@attack("a source", "has a link to a file outside of the platform's `sources`")
def link_out(a: Attacker) -> str:
    a.allow_sources(a.line.parent)
    data = a.line.parent / "data"
    data.mkdir()
    (data / "rows.jsonl").symlink_to("/etc/passwd")
    a.line.write_text(a.line.read_text().replace("tickets.jsonl", "data"))
    return outcome("task 0", lambda: a.plan().run_id)


@attack("a source", "has other bytes than when the plan was made")
def change_source(a: Attacker) -> str:
    plan = a.plan(text="{}")
    rows = a.line.parent / "tickets.jsonl"
    rows.write_text(rows.read_text().replace("{}", "[]"))
    return a.run(plan.uri, "validate_data")


@attack("a base model", "asks for code of its own, deep in a file")
def nested_code(a: Attacker) -> str:
    path = a.line.parent / "base" / "config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "text_config": {"auto_map": {"AutoModel": "evil.Model"}}}))
    return outcome("task 0", lambda: a.plan().run_id)


@attack("the node's cache", "exchanges a cached file, and the record beside it")
def poison_cache(a: Attacker) -> str:
    plan = a.plan(text="{}")
    a.run_until(plan, "evaluate")
    poisoned = list(a.cache.rglob("dataset.json"))
    assert poisoned
    for path in poisoned:
        path.chmod(0o644)
        path.write_text("poison")
    texts: list[str] = []
    run = a.steps["evaluate"]

    def evaluate(**arguments: Any) -> StepResult:
        texts.append((arguments["dataset"] / "dataset.json").read_text())
        return run(**arguments)

    evaluate.__signature__ = inspect.signature(run)  # type: ignore[attr-defined]
    assert execute.run_step(plan, "evaluate", lambda: evaluate).code == 0
    return "the step gets the true bytes: what differs is fetched again" if "poison" not in texts else "poisoned"


@attack("a form or REST", "weakens a gate of the line")
def weaken_gate(a: Attacker) -> str:
    line = load(a.line)
    return outcome("task 0", lambda: str(params.overrides(line, {"data.max_quarantined_fraction": 1.0})))


@attack("a form or REST", "finishes a run that was planned under weaker gates")
def resume_weaker_run(a: Attacker) -> str:
    text = a.line.read_text()
    a.line.write_text(text + "evaluate: {max_loss_to_champion: 0.5}\n")
    plan = a.plan()
    a.line.write_text(text)
    changes = explain.setting_changes(plan, load(a.line))
    return outcome("task 0", lambda: str(params.refuse_other_judgement(plan.run_id, changes)))


def publish_next(a: Attacker) -> None:
    """Publish another version."""
    plan = a.plan(text='{"another": "row"}')
    for name, step in a.steps.items():
        assert execute.run_step(plan, name, lambda step=step: step).code == 0  # type: ignore[misc]


def table_in_document() -> list[str]:
    return DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].split("\n")


@pytest.mark.parametrize(("prefix", "deed", "run"), ATTACKS, ids=[run.__name__ for _, _, run in ATTACKS])
def test_an_attack_ends_as_the_document_says(attacker: Attacker, prefix: str, deed: str, run: Attack) -> None:
    row = f"| {prefix} | {deed} | {run(attacker)} |"
    if os.environ.get("WRITE_ATTACKS"):
        write_row(row)
    assert row in table_in_document()


def test_the_document_has_no_row_that_no_attack_made() -> None:
    rows = [row for row in table_in_document() if row.startswith("| ") and "---" not in row][1:]
    assert [row.split(" | ")[:2] for row in rows] == [[f"| {prefix}", deed] for prefix, deed, _ in ATTACKS]


def write_row(row: str) -> None:
    """Put a row in the place of the one with the same first two cells, or at the end."""
    text = DOCUMENT.read_text(encoding="utf-8")
    head, _, remainder = text.partition(BEGIN)
    body, _, tail = remainder.partition(END)
    start = " | ".join(row.split(" | ")[:2])
    lines = [line for line in body.split("\n") if line and not line.startswith(start)]
    lines.append(row)
    order = {f"| {prefix} | {deed}": number for number, (prefix, deed, _) in enumerate(ATTACKS)}
    lines.sort(key=lambda line: order.get(" | ".join(line.split(" | ")[:2]), -1))
    DOCUMENT.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + tail, encoding="utf-8")
