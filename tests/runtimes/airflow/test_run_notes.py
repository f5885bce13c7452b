"""A run's note keeps what a person wrote, shows what programs and forms say as text, and fits into Airflow's column.

What Airflow's scheduler does with it is in `tests/demo/test_standalone_airflow.py`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported


def run(note: str | None = None, **conf: object) -> Any:
    return SimpleNamespace(note=note, conf=conf)


def test_a_persons_note_stays_and_a_run_that_begins_again_loses_its_old_result() -> None:
    from qlora_retrain.runtimes.airflow import run_notes

    dag_run = run("mine\n\nstill mine", reason="new labels")
    for _ in range(2):
        run_notes._set_note(dag_run)
        assert dag_run.note == "Reason: new labels\n\nmine\n\nstill mine"
        # First what a person looks for: Airflow's page shows the first line alone.
        run_notes._set_note(dag_run, "evaluate: refused\nVerdict: refuse.")
        assert dag_run.note == (
            "Result: evaluate: refused  \nVerdict: refuse.\n\nReason: new labels\n\nmine\n\nstill mine"
        )
    dag_run.note += "\n\nadded later"
    run_notes._set_note(dag_run, "Published v2.")
    assert dag_run.note == "Result: Published v2.\n\nReason: new labels\n\nmine\n\nstill mine\n\nadded later"


def test_a_run_of_which_nobody_says_anything_gets_no_note() -> None:
    from qlora_retrain.runtimes.airflow import run_notes

    for dag_run in (run(), SimpleNamespace(note=None, conf=None)):
        run_notes._set_note(dag_run)
        assert dag_run.note is None


@pytest.mark.parametrize("own", ["", "w" * 300, "w" * 900, "w" * 960, "w" * 1000])
def test_a_note_fits_and_the_persons_part_is_never_cut(own: str) -> None:
    from qlora_retrain.runtimes.airflow import run_notes

    dag_run = run(own, reason="*" * 500)
    run_notes._set_note(dag_run, "published " * 100)
    assert len(dag_run.note) <= 1000
    assert dag_run.note.endswith(own)
    # How a run ended is worth more than why it was started.
    assert ("Result: published" in dag_run.note) == (len(own) < 960)


def test_nothing_in_a_note_is_read_as_markdown_or_html() -> None:
    from qlora_retrain.runtimes.airflow import run_notes

    text = "<script>x</script> [click](http://evil) ![i](x) `a` *b* _c_ ~d~ #e | \x1b[2J\0"
    escaped = run_notes.escape_markdown(text)
    for mark in "<>[]`*_~#|!":
        assert escaped.count(mark) == escaped.count(f"\\{mark}") > 0
    assert "\0" not in escaped
    assert "\x1b" not in escaped


def test_the_plugin_listens_and_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    program = (
        "import sys, qlora_retrain.runtimes.airflow.run_notes as notes\n"
        "assert notes.RunNotes.listeners == [notes, notes.preload]\n"
        "print(sorted({'torch', 'pandas', 'boto3', 'transformers', 'qlora_retrain.config.line'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_note_that_cannot_be_composed_changes_nothing_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    from qlora_retrain.runtimes.airflow.dag_run import push_note

    def compose() -> str:
        return str({}["metric"])  # an evaluation that another version wrote

    texts: list[str] = []
    context = {"ti": SimpleNamespace(xcom_push=lambda key, value: texts.append(value))}
    push_note(context, compose)
    assert texts == []
    assert "the run's note lacks a text: KeyError" in caplog.text
    push_note(context, lambda: "published")
    assert texts == ["published"]
