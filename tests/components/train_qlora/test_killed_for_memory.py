"""The kernel kills the process that trains for memory, in a real control group; what is killed otherwise is not it."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from components.train_qlora import cgroup
from qlora_retrain.lm import checkpoints

LONG = {"batch_size": 16, "gradient_accumulation": 1, "max_steps": 4, "checkpoint_minutes": 1e-9}


@pytest.fixture
def limited():
    """The words before a command that put it into a control group of so many MiB, for as long as the block lasts."""

    @contextmanager
    def made(mib: int):
        group = place() / f"limited-{os.getpid()}"
        try:
            group.mkdir()
            limit = next(group / name for name in cgroup.LIMITS if (group / name).exists())
            limit.write_text(str(mib * 2**20))
        except (OSError, StopIteration) as error:
            pytest.skip(f"needs the right to make a control group with a limit of memory: {error}")
        try:
            yield ["sh", "-c", f'echo $$ > {group / "cgroup.procs"} && exec "$@"', "sh"]
        finally:
            group.rmdir()

    def place() -> Path:
        """Where a group for memory can be: below this process's; of version 2 beside it: only leaves hold processes."""
        folders = list(cgroup._folders())
        return next((folder for folder in folders if (folder / cgroup.LIMITS[1]).exists()), folders[0].parent)

    return made


def a_quarter_is_long(text: str) -> str:
    """16 of 64 rows of some 700 tokens: they share a step, the third one with seed 2."""
    lines = text.splitlines(keepends=True)
    return "".join(line.replace("order", "order " * 700) if 16 <= i < 32 else line for i, line in enumerate(lines))


@pytest.mark.slow
def test_a_kill_for_memory_halves_the_rows_and_the_run_goes_on_from_its_checkpoint(step, program, limited):
    run = step(train=64, mark=a_quarter_is_long)
    with limited(700) as before:
        code, said, errors = program(run, before=before, **LONG, seed=2).ended()
    assert code == 0, errors
    told = (
        "out of memory with 16 rows a pass: the kernel killed the process that trains for it, the limit being 700 MiB"
    )
    assert f"{told}: going on with 8 x 2" in said
    assert "going on from checkpoint-2 of 4 steps" in said
    papers = run.papers
    assert papers["out_of_memory"][0] == told
    assert papers["rows_a_pass"] == 16 // 2 ** len(papers["out_of_memory"])
    assert told in (run.adapter / "report.html").read_text()
    steps = (run.adapter / "loss.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_kill_for_memory_with_one_row_a_pass_ends_the_run_with_the_numbers(step, program, limited):
    run = step(train=64, mark=a_quarter_is_long)
    with limited(200) as before:
        code, _, errors = program(run, before=before, **LONG | {"batch_size": 1, "gradient_accumulation": 16}).ended()
    assert code == 137, errors
    assert errors.splitlines()[-1] == (
        "out of memory with 1 rows a pass: the kernel killed the process that trains for it, the limit being 200 MiB. "
        "Nothing is left to halve: take a smaller rank, shorter rows or more memory"
    )


@pytest.mark.slow
def test_a_kill_that_was_not_for_memory_is_tried_again(step, program):
    run = step()
    code, _, errors = program(run, "SIGKILL:5", checkpoint_minutes=1e-9).ended()
    assert code == 75
    assert errors.splitlines()[-1] == (
        "the process that trains was ended by SIGKILL, as when memory runs out. "
        "Run the same command again: it goes on from the newest checkpoint"
    )
    assert checkpoints.newest_valid(run.scratch)


@pytest.mark.parametrize(
    ("line", "files", "kills", "limit"),
    [
        ("0::/pod", {"pod/memory.events": "low 0\noom 4\noom_kill 3\n", "pod/memory.max": "1048576000\n"}, 3, 1000),
        ("0::/pod", {"pod/memory.events": "oom_kill 0\n", "pod/memory.max": "max\n"}, 0, None),
        ("0::/", {}, None, None),  # the root of all groups has no such files
        (
            "5:cpu:/\n4:hugetlb,memory:/pod",
            {"memory/pod/memory.oom_control": "oom_kill 2\n", "memory/pod/memory.limit_in_bytes": f"{2**30}"},
            2, 1024,
        ),
        (  # the names of the host, and the group's own files on top
            "4:memory:/kubepods/pod7",
            {"memory/memory.oom_control": "oom_kill 1\n", "memory/memory.limit_in_bytes": f"{2**63 - 4096}"},
            1, None,
        ),
        ("4:memory:/", {"memory/memory.oom_control": "under_oom 0\n"}, None, None),  # before Linux 4.13
    ],
    ids=["v2", "v2-no-limit", "v2-root", "v1", "v1-container", "v1-old"],
)  # fmt: skip
def test_the_kernels_files_are_read(tmp_path, monkeypatch, line, files, kills, limit):
    (tmp_path / "cgroup").write_text(line + "\n")
    for name, text in files.items():
        file = tmp_path / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(cgroup, "OF_THIS_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(cgroup, "MOUNTED", tmp_path / "fs")
    assert cgroup.kills() == kills
    assert cgroup.limit_mib() == limit


def test_a_machine_without_control_groups_tells_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "OF_THIS_PROCESS", tmp_path / "none")
    assert (cgroup.kills(), cgroup.limit_mib()) == (None, None)


def test_the_step_itself_stays_small():
    """What outlives the process that trains is not to be what the kernel takes for the largest."""
    code = "import sys, components.train_qlora.step; print(*{'torch', 'numpy', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
