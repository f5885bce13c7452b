"""The runner: every way a step can end, and what is left in the store after each."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core import graph, hashing, progress
from qlora_retrain.core.errors import Cause, DataRefused, Diverged, QualityRefused, TryAgain
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import code_identity, execute, fetch, make_plan, status
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, open_store
from qlora_retrain.storage.store import Store

Steps = dict[str, Callable[..., StepResult]]
RunAll = Callable[[Plan], dict[str, int]]


pytestmark = pytest.mark.usefixtures("own_signal_handlers")


def stored(store: Store, prefix: str) -> set[str]:
    return {e.path for e in store.list(prefix)}


def load_nothing() -> Callable[..., StepResult]:
    raise AssertionError("the step was loaded although there was no work to do")


def failing(error: BaseException) -> Callable[[], Callable[..., StepResult]]:
    """A `validate_data` that leaves half a file and ends in this error."""

    def run(
        config: Any,
        raw_data: Path,
        base_model: Path,
        golden_data: Path | None,
        reference_profile: Path | None,
        eval_data: Path | None,
        evaluation_history: Path | None,
        replay_data: Path | None,
        reference_data: Path | None,
        dataset: Path,
    ) -> StepResult:
        (dataset / "half").write_text("half")
        raise error

    return lambda: run


def execute_steps(plan: Plan, steps: Steps, *names: str) -> None:
    for name in names:
        assert execute.run_step(plan, name, lambda name=name: steps[name]).code == 0  # type: ignore[misc]


def test_the_whole_pipeline_runs_and_a_second_time_does_nothing(
    made_plan: Plan, run_all: RunAll, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(run_all(made_plan).values()) == [0] * 6
    before = stored(store, "artifacts")
    for name in [s.name for s in made_plan.steps]:
        assert execute.run_step(made_plan, name, load_nothing).code == 0
    assert stored(store, "artifacts") == before
    assert "was made already by attempt" in capsys.readouterr().out


def test_the_manifest_says_what_was_made_from_what(made_plan: Plan, run_all: RunAll, store: Store) -> None:
    run_all(made_plan)
    adapter = artifact.find_manifest(store, "adapter", made_plan.step("train_qlora").key)
    dataset = artifact.find_manifest(store, "dataset", made_plan.step("validate_data").key)
    assert adapter is not None
    assert dataset is not None
    assert adapter.inputs == made_plan.step("train_qlora").inputs
    assert adapter.read["dataset"] == dataset.content_hash
    assert adapter.provenance["run_id"] == made_plan.run_id
    assert adapter.config["learning_rate"] == 2e-4
    assert "max_hours" not in adapter.config
    assert adapter.numbers["steps"] == 3


def test_a_step_knows_why_its_automatic_settings_are_what_they_are(made_plan: Plan, small_steps: Steps) -> None:
    reasons: dict[str, str] = {}

    def run(
        config: Any, dataset: Path, base_nf4: Path, champion_adapter: Any, adapter: Path, *, scratch: Path
    ) -> StepResult:
        reasons.update(config.reasons)
        return small_steps["train_qlora"](config, dataset, base_nf4, champion_adapter, adapter, scratch=scratch)

    execute_steps(made_plan, small_steps, "validate_data", "quantize_model")
    assert execute.run_step(made_plan, "train_qlora", lambda: run).code == 0
    choices = [c for c in made_plan.choices if c.field.startswith("train.")]
    assert reasons == {c.field.removeprefix("train."): c.reason for c in choices}
    assert set(reasons) == {"alpha", "warmup_ratio", "device", "precision", "attention", "kernels"}


def test_a_form_that_needs_llama_cpp_is_refused_before_training_where_it_is_not_installed(
    line: Path,
    tiny_model: Path,
    root_uri: str,
    small_steps: Steps,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = line.read_text().replace("base_model: base", f"base_model: {tiny_model}")
    line.write_text(f"{text}merge: {{exports: [bf16, gguf-q4_k_m]}}\n")
    plan = make_plan.make_plan(line, root_uri)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)

    execute_steps(plan, small_steps, "validate_data")
    assert execute.run_step(plan, "quantize_model", load_nothing).code == 12
    assert "gguf-q4_k_m is written by llama.cpp's own quantizer, and xllamacpp is not" in capsys.readouterr().err


@pytest.mark.parametrize("refusal", [DataRefused("half of the rows are bad"), QualityRefused("worse than before")])
def test_a_refusal_is_kept_and_every_retry_and_every_follower_returns_its_code(
    made_plan: Plan, small_steps: Steps, store: Store, capsys: pytest.CaptureFixture[str], refusal: DataRefused
) -> None:
    def run(
        config: Any,
        raw_data: Path,
        base_model: Path,
        golden_data: Path | None,
        reference_profile: Path | None,
        eval_data: Path | None,
        evaluation_history: Path | None,
        replay_data: Path | None,
        reference_data: Path | None,
        dataset: Path,
    ) -> StepResult:
        (dataset / "report.html").write_text("why")
        return StepResult({"rows": 1}, refused=refusal)

    assert execute.run_step(made_plan, "validate_data", lambda: run).code == refusal.exit_code
    assert execute.run_step(made_plan, "validate_data", load_nothing).code == refusal.exit_code
    assert status.exit_code(made_plan, "validate_data") == refusal.exit_code
    execute_steps(made_plan, small_steps, "quantize_model")
    assert execute.run_step(made_plan, "train_qlora", load_nothing).code == refusal.exit_code
    assert str(refusal) in capsys.readouterr().err
    manifest = artifact.find_manifest(store, "dataset", made_plan.step("validate_data").key)
    assert manifest is not None
    assert (manifest.outcome, manifest.reason, manifest.exit_code) == ("refused", str(refusal), refusal.exit_code)
    assert f"{manifest.prefix}/report.html" in stored(store, "artifacts")


@pytest.mark.parametrize(
    ("error", "exit_code", "cause"),
    [
        (Diverged("the loss is NaN at step 3"), 14, "diverged"),
        (TryAgain("throttled", cause=Cause.THROTTLED), 75, "throttled"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x"), 75, "disk_full"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/x"), 75, "disk_full"),
        (RuntimeError(f"OSError: [Errno 122] {os.strerror(errno.EDQUOT)}"), 75, "disk_full"),
        (Exception("I/O error: No space left on device (os error 28)"), 75, "disk_full"),  # as safetensors says it
        (MemoryError("no more"), 137, "host_oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 137, "host_oom"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 137, "gpu_oom"),
        (MemoryError("out of memory with a micro-batch size of 1; CUDA out of memory. Tried 2.00 GiB"), 137, "gpu_oom"),
        (MemoryError("out of memory with a micro-batch size of 1; CUDNN_STATUS_ALLOC_FAILED"), 137, "gpu_oom"),
        (ValueError("a bug"), 1, "bug"),
        (KeyError("unknown label: 'laptop: out of memory'"), 1, "bug"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, "bug"),
    ],
)
def test_an_error_makes_no_artifact_and_has_its_code(
    made_plan: Plan, store: Store, node_cache: Path, error: Exception, exit_code: int, cause: str
) -> None:
    ending = execute.run_step(made_plan, "validate_data", failing(error))
    assert (ending.code, ending.cause, ending.step) == (exit_code, cause, "validate_data")
    assert ending.key == made_plan.step("validate_data").key
    assert ending.retry == (exit_code in (75, 137) and cause != "gpu_oom")
    assert stored(store, "artifacts") == set()
    assert not list((node_cache / "work").iterdir())
    (log,) = (open_store(store.uri).read(path).data.decode() for path in stored(store, f"runs/{made_plan.run_id}/logs"))
    assert str(error) in log
    assert ("Traceback" in log) == (exit_code == 1)
    assert ("the GPU ran out of memory" in log) == (cause == "gpu_oom")


def test_after_an_error_the_same_command_can_succeed(made_plan: Plan, small_steps: Steps) -> None:
    assert execute.run_step(made_plan, "validate_data", failing(OSError(errno.ENOSPC, "full"))).code == 75
    assert execute.run_step(made_plan, "validate_data", lambda: small_steps["validate_data"]).code == 0


def test_of_two_attempts_at_once_both_end_as_the_first_and_the_other_leaves_nothing(
    made_plan: Plan, small_steps: Steps, store: Store
) -> None:
    inner: list[int] = []

    def slow(
        config: Any,
        raw_data: Path,
        base_model: Path,
        golden_data: Path | None,
        reference_profile: Path | None,
        eval_data: Path | None,
        evaluation_history: Path | None,
        replay_data: Path | None,
        reference_data: Path | None,
        dataset: Path,
    ) -> StepResult:
        inner.append(execute.run_step(made_plan, "validate_data", lambda: small_steps["validate_data"]).code)
        (dataset / "other.json").write_text("{}")
        return StepResult({"rows_train": 1}, refused=DataRefused("this attempt alone says no"))

    assert execute.run_step(made_plan, "validate_data", lambda: slow).code == 0
    assert inner == [0]
    manifest = artifact.find_manifest(store, "dataset", made_plan.step("validate_data").key)
    assert manifest is not None
    assert manifest.numbers["rows_train"] == 27
    assert {p.split("/")[3] for p in stored(store, "artifacts")} == {manifest.attempt, "_manifest.json"}


def test_a_corrupted_input_names_the_drop_command_and_after_it_all_is_made_again(
    made_plan: Plan, small_steps: Steps, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    execute_steps(made_plan, small_steps, "validate_data", "quantize_model")
    key = made_plan.step("validate_data").key
    manifest = artifact.find_manifest(store, "dataset", key)
    assert manifest is not None
    path = tmp_path / "store" / manifest.prefix / "dataset.json"
    path.write_bytes(path.read_bytes()[::-1])  # the same size
    assert execute.run_step(made_plan, "train_qlora", lambda: small_steps["train_qlora"]).code == 13
    command = f"qlora-retrain drop dataset {key} --root {store.uri}"
    assert command in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "qlora_retrain.cli", *command.split()[1:]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert status.exit_code(made_plan, "validate_data") is None
    execute_steps(made_plan, small_steps, "validate_data", "train_qlora")


@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_an_artifact_with_a_broken_file_is_not_taken_for_made(
    made_plan: Plan, small_steps: Steps, store: Store, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    execute_steps(made_plan, small_steps, "validate_data", "quantize_model")
    manifest = artifact.find_manifest(store, "dataset", made_plan.step("validate_data").key)
    assert manifest is not None
    path = tmp_path / "store" / manifest.prefix / "dataset.json"
    path.unlink() if fault == "missing" else path.write_text("x")
    assert execute.run_step(made_plan, "validate_data", load_nothing).code == 13
    assert execute.run_step(made_plan, "train_qlora", lambda: small_steps["train_qlora"]).code == 13
    assert capsys.readouterr().err.count("qlora-retrain drop dataset") == 2


def test_an_input_that_is_not_made_or_was_collected_means_try_again(
    made_plan: Plan, small_steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute.run_step(made_plan, "train_qlora", load_nothing).code == 75
    assert "run validate_data first" in capsys.readouterr().err


def test_an_input_that_was_dropped_while_it_was_fetched_means_try_again(
    made_plan: Plan, small_steps: Steps, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute_steps(made_plan, small_steps, "validate_data", "quantize_model")
    input_manifests = fetch.input_manifests

    def drop_afterwards(*arguments: Any) -> Any:
        manifests = input_manifests(*arguments)
        artifact.drop(store, "dataset", made_plan.step("validate_data").key)
        return manifests

    monkeypatch.setattr(fetch, "input_manifests", drop_afterwards)
    ending = execute.run_step(made_plan, "train_qlora", lambda: small_steps["train_qlora"])
    assert (ending.code, ending.cause) == (75, Cause.INPUT_MISSING)


def test_inputs_that_were_not_made_from_each_other_are_refused(
    made_plan: Plan, small_steps: Steps, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    execute_steps(made_plan, small_steps, "validate_data", "quantize_model", "train_qlora")
    key = made_plan.step("validate_data").key
    store.delete(stored(store, artifact.artifact_folder("dataset", key)))  # by hand, so that the adapter stays

    def run(
        config: Any,
        raw_data: Path,
        base_model: Path,
        golden_data: Path | None,
        reference_profile: Path | None,
        eval_data: Path | None,
        evaluation_history: Path | None,
        replay_data: Path | None,
        reference_data: Path | None,
        dataset: Path,
    ) -> StepResult:
        (dataset / "dataset.json").write_text('"the same key in other bytes"')
        return StepResult()

    assert execute.run_step(made_plan, "validate_data", lambda: run).code == 0
    assert execute.run_step(made_plan, "evaluate", load_nothing).code == 13
    adapter = made_plan.step("train_qlora").key
    err = capsys.readouterr().err
    assert (
        "was made from another dataset than the one there now: to make it again, run: "
        f"qlora-retrain drop adapter {adapter}" in err
    )


def test_a_run_whose_parameters_are_not_the_graphs_is_refused_with_both(
    made_plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: Any, data: Path, dataset: Path) -> StepResult:
        return StepResult()

    assert execute.run_step(made_plan, "validate_data", lambda: run).code == 1
    err = capsys.readouterr().err
    passed = (
        "base_model, config, dataset, eval_data, evaluation_history, golden_data, raw_data, reference_data, "
        "reference_profile, replay_data"
    )
    assert f"the graph passes ({passed})" in err
    assert "it takes (config, data, dataset)" in err


def test_what_is_no_report_is_our_bug(made_plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    def run(
        config: Any,
        raw_data: Path,
        base_model: Path,
        golden_data: Path | None,
        reference_profile: Path | None,
        eval_data: Path | None,
        evaluation_history: Path | None,
        replay_data: Path | None,
        reference_data: Path | None,
        dataset: Path,
    ) -> Any:
        return {"rows": 1}

    assert execute.run_step(made_plan, "validate_data", lambda: run).code == 1
    assert "expected a StepResult, found dict" in capsys.readouterr().err


def test_code_that_changed_since_the_plan_is_refused_but_what_is_made_counts(
    made_plan: Plan, small_steps: Steps, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    execute_steps(made_plan, small_steps, "validate_data")
    monkeypatch.setattr(code_identity, "code_hash", lambda name: "0" * 64)
    assert execute.run_step(made_plan, "validate_data", load_nothing).code == 0
    assert execute.run_step(made_plan, "quantize_model", load_nothing).code == 12
    assert "the code changed since the plan was made" in capsys.readouterr().err


def test_an_unchanged_plan_is_done_at_once(line: Path, root_uri: str, run_all: RunAll, store: Store) -> None:
    run_all(make_plan.make_plan(line, root_uri))
    again = make_plan.make_plan(line, root_uri)
    before = stored(store, "artifacts") | stored(store, "models")
    assert again.unchanged
    for step in again.steps:
        assert execute.run_step(again, step.name, load_nothing).code == status.exit_code(again, step.name) == 0
    assert stored(store, "artifacts") | stored(store, "models") == before


def test_a_step_sees_only_read_only_copies_of_its_inputs(made_plan: Plan, line: Path) -> None:
    inputs: dict[str, Any] = {}

    def run(
        config: Any,
        raw_data: Path,
        base_model: Path,
        golden_data: Path | None,
        reference_profile: Path | None,
        eval_data: Path | None,
        evaluation_history: Path | None,
        replay_data: Path | None,
        reference_data: Path | None,
        dataset: Path,
    ) -> StepResult:
        inputs["files"] = sorted(p.name for p in base_model.iterdir())
        inputs["modes"] = {p.stat().st_mode & 0o777 for p in [*raw_data.iterdir(), *base_model.iterdir()]}
        inputs["golden"] = golden_data
        inputs["empty"] = list(dataset.iterdir()) == []
        return StepResult()

    assert execute.run_step(made_plan, "validate_data", lambda: run).code == 0
    assert inputs == {"files": ["config.json", "tokenizer.json"], "modes": {0o444}, "golden": None, "empty": True}


def test_a_steps_output_and_checkpoints_are_on_its_own_disk_and_its_inputs_in_the_cache(
    made_plan: Plan, small_steps: Steps, node_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a pod whose cache is shared over a network."""
    monkeypatch.setenv("QLORA_RETRAIN_WORK", str(tmp_path / "disk"))
    inputs: dict[str, Path] = {}

    def run(
        config: Any, dataset: Path, base_nf4: Path, champion_adapter: Any, adapter: Path, *, scratch: Path
    ) -> StepResult:
        inputs.update(dataset=dataset, base_nf4=base_nf4, adapter=adapter, scratch=scratch)
        inputs.update({path.name: path for path in (node_cache / "work").glob("*/*")})
        return StepResult()

    execute_steps(made_plan, small_steps, "validate_data", "quantize_model")
    assert execute.run_step(made_plan, "train_qlora", lambda: run).code == 0
    places = {
        name: next(p for p in (node_cache, tmp_path / "disk") if p in path.parents) for name, path in inputs.items()
    }
    assert places == {
        "dataset": node_cache,
        "base_nf4": node_cache,
        "adapter": tmp_path / "disk",
        "scratch": tmp_path / "disk",
    }


def test_a_champion_with_a_flipped_byte_is_refused(
    line: Path, root_uri: str, run_all: RunAll, small_steps: Steps, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_all(make_plan.make_plan(line, root_uri))
    plan = make_plan.make_plan(line, root_uri, overrides=["train.seed=1"])
    assert plan.champion is not None
    execute_steps(plan, small_steps, "train_qlora")
    path = tmp_path / "store" / "models" / plan.line / "versions" / plan.champion.version / "model" / "config.json"
    path.unlink()
    assert execute.run_step(plan, "evaluate", lambda: small_steps["evaluate"]).code == 13
    path.write_text("[]\n")
    assert execute.run_step(plan, "evaluate", lambda: small_steps["evaluate"]).code == 13
    assert capsys.readouterr().err.count("the version in production is broken") == 2


def test_a_source_that_changed_since_the_plan_is_refused(made_plan: Plan, line: Path, small_steps: Steps) -> None:
    (line.parent / "tickets.jsonl").write_text("other rows\n")
    assert execute.run_step(made_plan, "validate_data", lambda: small_steps["validate_data"]).code == 13


def test_the_log_and_the_last_progress_of_a_step_are_in_the_runs_folder(made_plan: Plan, store: Store) -> None:
    def run(
        config: Any,
        raw_data: Path,
        base_model: Path,
        golden_data: Path | None,
        reference_profile: Path | None,
        eval_data: Path | None,
        evaluation_history: Path | None,
        replay_data: Path | None,
        reference_data: Path | None,
        dataset: Path,
    ) -> StepResult:
        progress.say("halfway")
        progress.update("reading", 5, 10)
        progress.update("reading", 10, 10, rows=30)
        return StepResult({"rows": 30})

    streams = (sys.stdout, sys.stderr)
    for _ in range(2):  # the listener of the first must not outlive it
        assert execute.run_step(made_plan, "validate_data", lambda: run).code == 0
    assert (sys.stdout, sys.stderr) == streams
    logs = sorted(stored(store, f"runs/{made_plan.run_id}/logs"), key=lambda p: len(store.read(p).data))
    assert len(logs) == 2
    text = store.read(logs[-1]).data.decode()
    assert "halfway" in text
    assert "data.min_train_rows = 10" in text
    assert "validate_data: done: rows 30" in text
    progress_document = json.loads(store.read(f"runs/{made_plan.run_id}/status/validate_data.json").data)
    assert progress_document == {"what": "reading", "done": 10, "total": 10, "rows": 30}


def test_a_log_that_cannot_be_kept_fails_no_step(
    made_plan: Plan, small_steps: Steps, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "store" / "runs" / made_plan.run_id / "logs").write_text("a file where a folder should be")
    assert execute.run_step(made_plan, "validate_data", lambda: small_steps["validate_data"]).code == 0


def test_a_poisoned_node_cache_is_fetched_again_whatever_lies_beside_it(line: Path, root_uri: str) -> None:
    plan = make_plan.make_plan(line, root_uri)
    step = graph.step("validate_data")
    for item in (i for i in step.reads if i.name in ("raw_data", "base_model")):
        folder = fetch.fetch_input(plan, plan.step(step.name), open_store(root_uri), item, {})
        assert folder is not None
        file = next(p for p in sorted(folder.iterdir()) if p.is_file())
        honest = file.read_bytes()

        # Another user of the node changes a file, and every note of its hash that lies in the cache.
        file.chmod(0o644)
        file.write_bytes(honest[:-1] + b"x")
        record = "".join(f"{hashing.sha256_file(p)} {p.name}\n" for p in sorted(folder.iterdir()))
        folder.with_name(f"{folder.name}.sha256").write_text(record)
        again = fetch.fetch_input(plan, plan.step(step.name), open_store(root_uri), item, {})
        assert again is not None
        assert (again / file.name).read_bytes() == honest
