"""The command line: fast, one line for a mistake, the exit codes of the table."""

from __future__ import annotations

import itertools
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from qlora_retrain.cli import main, runs
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause, IntegrityError
from qlora_retrain.pipeline import make_plan, run_endings
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store, registry

RunAll = Callable[[Plan], dict[str, int]]
VERBS = (
    "graph",
    "check",
    "preview",
    "plan",
    "run",
    "status",
    "pull",
    "promote",
    "rollback",
    "drop",
    "ask",
    "models",
    "policy",
    "deploy-check",
    "doctor",
    "egress",
)


def qlora(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own."""
    program = [sys.executable, "-m", "qlora_retrain.cli", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, env={**os.environ, **environment})


def inside(*arguments: object) -> int:
    """The program in this process: faster."""
    with pytest.raises(SystemExit) as caught:
        main.main([str(a) for a in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    "endpoint",
    ["http://user:canary7731@127.0.0.1:9", "http://canary7731@127.0.0.1:9", "http://127.0.0.1:9/?token=canary7731"],
)
def test_no_verb_shows_what_the_url_of_a_server_holds(
    line: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], endpoint: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "canary7731")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert inside("plan", line, "--root", "s3://bucket/store") in (12, 75)
    assert inside("plan", line, "--root", "s3://b", "--resume", "x", "--set", "sources.raw_data=s3://u:canary7731@b")
    output = "".join(capsys.readouterr())
    assert "127.0.0.1:9" in output
    assert "canary7731" not in output


def test_check_says_which_file_airflow_takes_a_line_from(line: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hint = "Airflow runs a line from the file that is named after it: intents.yaml"
    for name in ("intents.yaml", "another.yaml"):
        line = line.rename(line.with_name(name))
        with pytest.raises(SystemExit):
            main.main(["check", str(line)])
        output = capsys.readouterr().out
        assert "line intents is valid" in output
        assert (hint in output) is (name == "another.yaml")


def test_help_takes_half_a_second_of_the_processor_at_most() -> None:
    seconds = []
    for _ in range(3):
        # The processor's time, and not the clock's: other tests run at the same time.
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = qlora("--help")
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
        assert done.returncode == 0
        assert all(re.search(rf"^    {verb}\s", done.stdout, re.MULTILINE) for verb in VERBS)
    assert min(seconds) < 0.5


def test_help_imports_nothing_but_argparse_and_the_errors() -> None:
    program = "import sys\nfrom qlora_retrain.cli import main as cli\nprint(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.split()
    assert not {"pydantic", "yaml", "boto3", "torch", "transformers", "airflow", "kfp"} & set(modules)


@pytest.mark.parametrize("arguments", [["publish"], [], ["plan"], ["pull", "x"], ["graph", "--format", "dot"]])
def test_a_mistake_in_the_arguments_is_12(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert inside(*arguments) == 12
    assert "usage: qlora-retrain" in capsys.readouterr().err


def test_check_shows_when_the_next_runs_start(line: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inside("check", line, "--set", "schedule=0 3 * * mon") == 0
    times = re.findall(r"Mon (\d{4}-\d\d-\d\d 03:00)", capsys.readouterr().out)
    starts = [datetime.fromisoformat(text) for text in times]
    assert [second - first for first, second in itertools.pairwise(starts)] == [timedelta(days=7)] * 2
    assert starts[0].weekday() == 0

    assert inside("check", line, "--set", "schedule=0 0 31 2 *") == 12
    assert "names a day that no year has" in capsys.readouterr().err


def test_check_says_every_fault_of_a_line_at_once(line: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inside("check", line) == 0
    line.write_text(line.read_text() + "train: {rank: 0, learning_rat: 1}\nevaluate: {confidence: 2}\n")
    assert inside("check", line, "--set", "quantize.format=nf5") == 12
    err = capsys.readouterr().err
    for fault in ("train.rank", "train.learning_rat: unknown field", "evaluate.confidence", "did you mean nf4?"):
        assert fault in err
    assert "Traceback" not in err


def test_a_traceback_is_shown_only_when_asked_for(line: Path) -> None:
    short = qlora("check", line.with_name("none.yaml"))
    assert (short.returncode, short.stderr.count("\n")) == (12, 1)
    long = qlora("check", line.with_name("none.yaml"), "--debug")
    assert "Traceback" in long.stderr


def test_a_bug_of_ours_is_1_and_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(args: object) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(runs, "_graph", broken)
    assert inside("graph") == 1
    assert "internal error: ZeroDivisionError: a bug; run it with --debug to see where" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        main.main(["graph", "--debug"])


def test_a_reader_that_stops_reading_is_no_error() -> None:
    program = f"{sys.executable} -m qlora_retrain.cli graph | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("0", "")


def test_without_a_store_the_two_ways_to_name_one_are_said(
    line: Path, root_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("QLORA_RETRAIN_ROOT", raising=False)
    assert inside("plan", line) == 12
    err = capsys.readouterr().err
    assert "--root" in err
    assert "QLORA_RETRAIN_ROOT" in err
    monkeypatch.setenv("QLORA_RETRAIN_ROOT", root_uri)
    assert inside("plan", line) == 0


def test_a_root_with_a_secret_is_refused_without_repeating_it(line: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["plan", line], ["status", "latest"], ["pull", "x@y", "z"], ["drop", "dataset", "a" * 64]):
        assert inside(*verb, "--root", "s3://AKIAUSER:hunter2@bucket/x") == 12
    output = capsys.readouterr()
    assert "hunter2" not in output.err + output.out


def test_plan_says_what_will_run_and_why(
    line: Path, root_uri: str, run_all: RunAll, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inside("plan", line, "--root", root_uri) == 0
    assert capsys.readouterr().out.count("will run: no earlier run of this line") == 6
    run_all(make_plan.make_plan(line, root_uri))
    time.sleep(1.1)  # runs are ordered by the second
    assert inside("plan", line, "--root", root_uri) == 0
    assert "nothing will run" in capsys.readouterr().out
    time.sleep(1.1)
    assert inside("plan", line, "--root", root_uri, "--set", "train.learning_rate=1e-3") == 0
    rows = {row.split()[0]: row for row in capsys.readouterr().out.splitlines()}
    assert "made already: done" in rows["validate_data"]
    assert "made already: done" in rows["quantize_model"]
    assert "train.learning_rate was 0.0002, is 0.001" in rows["train_qlora"]
    assert rows["evaluate"].endswith("will run: new adapter")


def test_status_tells_each_step_of_a_run(
    line: Path, root_uri: str, run_all: RunAll, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inside("status", "latest", "--root", root_uri) == 12
    plan = make_plan.make_plan(line, root_uri)
    assert inside("status", plan.run_id, "--root", root_uri) == 0
    assert capsys.readouterr().out.count("not made") == 6
    run_all(plan)
    assert inside("status", "latest", "--root", root_uri) == 0
    assert "rows_train 27" in capsys.readouterr().out
    assert inside("status", "no-such-run", "--root", root_uri) == 12

    # A later run that got no plan has its folder too, with the ending of its first task.
    run_endings.write_to_store(root_uri, "20990101T000000Z-0123456789ab", Ending(12, Cause.USAGE, "no", "plan"))
    assert inside("status", "latest", "--root", root_uri) == 0


def test_promote_rollback_and_pull_speak_of_the_same_alias(
    line: Path, root_uri: str, run_all: RunAll, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_all(make_plan.make_plan(line, root_uri))
    (line.parent / "tickets.jsonl").write_text("newer\n")
    run_all(make_plan.make_plan(line, root_uri))
    first, second = open_store(root_uri).children("models/intents/versions")
    at = ("--root", root_uri)
    assert inside("pull", "intents@production", tmp_path / "dest", *at) == 0
    bad = registry.read_alias(open_store(root_uri), "intents", "production")[0]
    assert bad is not None
    pulled = capsys.readouterr()
    assert f"intents {bad.version}: " in pulled.out
    assert f"its manifest has the sha256 {bad.manifest_sha256}" in pulled.err
    pinned = ("pull", f"intents@{bad.version}", tmp_path / "part", *at, "--sha256")
    assert inside(*pinned, bad.manifest_sha256, "--parts", "adapter") == 0
    assert list((tmp_path / "part" / "adapter").iterdir())
    assert not (tmp_path / "part" / "model" / "model.safetensors").exists()
    assert inside(*pinned, "0" * 64) == 13
    assert inside(*pinned, bad.manifest_sha256, "--parts", "all") == 12
    capsys.readouterr()
    (good,) = {first, second} - {bad.version}
    assert inside("rollback", "intents", "--reason", "bad", *at) == 0
    assert f"intents@production: {good}, generation 3" in capsys.readouterr().out
    assert inside("promote", "intents", bad.version, "--reason", "x", *at) == 11
    assert "--override" in capsys.readouterr().err
    assert inside("promote", "intents", bad.version, "--reason", "looked", "--override", *at) == 0
    assert inside("promote", "intents", bad.version, "--reason", "again", *at) == 0
    assert "(already)" in capsys.readouterr().out
    assert inside("promote", "intents", good, "--alias", "latest", "--reason", "x", *at) == 12
    assert inside("rollback", "intents", "--alias", "latest", "--reason", "x", *at) == 12
    assert inside("promote", "intents", "none", "--reason", "x", *at) == 12
    assert inside("promote", "intents", good, "--alias", "Bad Name", "--reason", "x", *at) == 12


def test_drop_takes_what_was_made_from_it_along_and_says_so(
    line: Path, root_uri: str, run_all: RunAll, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan.make_plan(line, root_uri)
    run_all(plan)
    key = plan.step("train_qlora").key
    capsys.readouterr()
    assert inside("drop", "adapter", key, "--root", root_uri) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"dropped adapter/{key}, ")
    assert all(name in out for name in ("evaluation/", "model/", "release/"))
    assert inside("drop", "adapter", key, "--root", root_uri) == 12
    assert inside("drop", "adapter", key[:12], "--root", root_uri) == 12
    assert set(run_all(plan).values()) == {0}


def test_the_graph_is_printed_for_people_and_for_mermaid(capsys: pytest.CaptureFixture[str]) -> None:
    assert inside("graph") == 0
    assert inside("graph", "--format", "mermaid") == 0
    assert "flowchart LR" in capsys.readouterr().out


def test_a_problem_of_any_kind_ends_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object) -> int:
        raise IntegrityError("not what was promised")

    monkeypatch.setattr(runs, "_graph", broken)
    assert inside("graph") == 13
