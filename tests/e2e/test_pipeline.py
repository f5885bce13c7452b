"""What a person sees of whole runs: published, unchanged, partly reused, concurrent, killed, refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def production(project) -> str | None:  # type: ignore[no-untyped-def]
    path = project.folder / "store/models/tiny/aliases/production.json"
    return json.loads(path.read_text())["version"] if path.exists() else None


def plan_lines(text: str) -> dict[str, str]:
    """Return step -> what the plan says about it."""
    return dict(re.findall(r"^  (\w+) +[0-9a-f]{12}  (.*)$", text, flags=re.MULTILINE))


def manifests(project) -> dict[str, str]:  # type: ignore[no-untyped-def]
    """Return manifest path -> attempt, for every artifact in the store."""
    root = project.folder / "store/artifacts"
    return {str(p.relative_to(root)): json.loads(p.read_text())["attempt"] for p in root.rglob("_manifest.json")}


def test_a_run_publishes_a_model_that_plain_transformers_loads(published, tmp_path: Path) -> None:
    pulled = published.cli("pull", "tiny@production", tmp_path / "m", "--root", published.root)
    assert pulled.exit_code == 0, pulled.text

    # Neither peft nor bitsandbytes may be needed to load it.
    program = (
        "import sys; sys.modules['peft'] = sys.modules['bitsandbytes'] = None\n"
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "m = M.from_pretrained(sys.argv[1]); t = T.from_pretrained(sys.argv[1])\n"
        "i = t('hello', return_tensors='pt'); print(m.generate(**i, max_new_tokens=3).shape[0])"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "m/model")], capture_output=True, text=True
    )
    assert completed.stdout.strip() == "1", completed.stderr
    recipe = (tmp_path / "m/recipe.json").read_text() + (tmp_path / "m/manifest.json").read_text()
    assert str(published.folder) not in recipe, "a published document names a place of this machine"


def test_a_second_run_starts_nothing(published) -> None:
    before = manifests(published)
    result = published.run()
    assert result.exit_code == 0
    assert f"unchanged: production is already {production(published)}" in result.out
    assert manifests(published) == before


def test_a_new_learning_rate_reuses_data_and_base(published) -> None:
    plan = published.cli("plan", published.config, "--root", published.root, "--set", "train.learning_rate=2e-2")
    forecasts = plan_lines(plan.out)
    assert forecasts["validate_data"] == forecasts["quantize_model"] == "made already: done"
    assert "train.learning_rate was 0.005, is 0.02" in forecasts["train_qlora"]
    assert all(forecasts[step].startswith("will run") for step in ("evaluate", "merge_adapter", "publish"))


@pytest.mark.parametrize("setting", ["train.max_hours=2", "train.log_every_steps=3", "train.checkpoint_minutes=1"])
def test_operational_settings_make_nothing_again(published, setting: str) -> None:
    assert "unchanged" in published.cli("plan", published.config, "--root", published.root, "--set", setting).out


def test_two_runs_of_one_plan_at_once_make_each_artifact_once(make_project: Callable) -> None:
    project = make_project()
    output = project.cli("plan", project.config, "--root", project.root).out
    uri = re.search(r"^plan (.*)$", output, flags=re.MULTILINE)[1]  # type: ignore[index]
    processes = [project.start("run", "--plan", uri) for _ in range(2)]
    outputs = [p.communicate(timeout=400)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)

    assert len(manifests(project)) == 6
    for path, attempt in manifests(project).items():
        folder = project.folder / "store/artifacts" / Path(path).parent
        assert sorted(p.name for p in folder.iterdir()) == sorted(["_manifest.json", attempt])
        manifest = json.loads((folder / "_manifest.json").read_text())
        assert {f["path"] for f in manifest["files"]} == {
            p.relative_to(folder / attempt).as_posix() for p in (folder / attempt).rglob("*") if p.is_file()
        }
    assert len(list((project.folder / "store/models/tiny/versions").iterdir())) == 1


def test_training_killed_in_the_middle_goes_on_and_ends_the_same(
    make_project: Callable, kill_tree: Callable[[int], None]
) -> None:
    training = {"epochs": 16, "checkpoint_minutes": 0.01, "log_every_steps": 1}
    uninterrupted, killed = make_project(train=training), make_project(train=training)
    assert uninterrupted.run().exit_code == 0

    process = killed.start("run", killed.config, "--root", killed.root)
    assert process.stdout is not None
    for line in process.stdout:
        # Older checkpoints go meanwhile, so nothing looks for files inside them.
        saved = list((killed.folder / "store/scratch/train_qlora").glob("*/*/checkpoint-*/_complete.json"))
        if saved and line.startswith("train_qlora | training"):
            break
    # Here a checkpoint is complete and training has gone on from it, so work is lost.
    kill_tree(process.pid)
    process.communicate()
    assert not list((killed.folder / "store/artifacts/adapter").glob("*/_manifest.json"))
    result = killed.run()
    assert result.exit_code == 0, result.text
    assert "resuming from scratch/train_qlora/" in result.out
    uninterrupted_loss, resumed_loss = (_adapter_numbers(p)["eval_loss"] for p in (uninterrupted, killed))
    assert resumed_loss == pytest.approx(uninterrupted_loss, rel=0.01)
    assert not list((killed.folder / "store/scratch").rglob("checkpoint-*")), "checkpoints outlived the success"


def test_refused_data_keeps_its_report_and_repeats_its_code_at_once(make_project: Callable) -> None:
    project = make_project(data={"min_train_rows": 5000})
    first = project.run()
    assert first.exit_code == 10, first.text
    assert list((project.folder / "store/artifacts/dataset").glob("*/*/report.html"))

    logs = set((project.folder / "store/runs").glob("*/logs/*"))
    second = project.run()
    assert second.exit_code == 10
    assert "as before" in second.out
    assert set((project.folder / "store/runs").glob("*/logs/*")) == logs != set(), "the second run started a step"
    assert production(project) is None


def test_refused_quality_keeps_production_where_it_is(published) -> None:
    before = production(published)
    result = published.run("--set", "evaluate.min_accuracy=1.0", "--set", "train.max_steps=1")
    assert result.exit_code == 11, result.text
    assert published.run("--set", "evaluate.min_accuracy=1.0", "--set", "train.max_steps=1").exit_code == 11
    assert production(published) == before


def _adapter_numbers(project) -> dict[str, float]:  # type: ignore[no-untyped-def]
    manifest_path = next((project.folder / "store/artifacts/adapter").glob("*/_manifest.json"))
    return json.loads(manifest_path.read_text())["numbers"]
