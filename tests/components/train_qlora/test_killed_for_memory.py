"""The kernel kills the training process for memory, in a real control group; other kills are not taken for that."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from components.train_qlora.processes import cgroup
from qlora_retrain.lm import checkpoints

LONG = {"micro_batch_size": 16, "global_batch_size": 16, "max_steps": 4, "checkpoint_minutes": 1e-9}


@pytest.fixture
def memory_limit():
    """Make a control group of this many MiB, for as long as the block lasts; its value goes before a command."""

    @contextmanager
    def limited(mib: int):
        # Making a group takes root, and on many machines even root may not.
        group = group_folder() / f"limited-{os.getpid()}"
        try:
            group.mkdir()
            limit = next(group / name for name in cgroup.LIMIT_FILES if (group / name).exists())
            limit.write_text(str(mib * 2**20))
        except (OSError, StopIteration) as error:
            pytest.skip(f"needs the right to make a control group with a limit of memory: {error}")
        try:
            yield ["sh", "-c", f'echo $$ > {group / "cgroup.procs"} && exec "$@"', "sh"]
        finally:
            group.rmdir()

    def group_folder() -> Path:
        """Return where a group with a memory limit may be made.

        With version 1 that is below this process's group. With version 2 it is beside it, since only leaves may hold
        processes.
        """
        folders = list(cgroup._folders())
        return next((folder for folder in folders if (folder / cgroup.LIMIT_FILES[1]).exists()), folders[0].parent)

    return limited


def lengthen_a_quarter(text: str) -> str:
    """Make 16 of 64 rows about 700 tokens long: with seed 2 the third step has all of them."""
    lines = text.splitlines(keepends=True)
    return "".join(line.replace("order", "order " * 700) if 16 <= i < 32 else line for i, line in enumerate(lines))


@pytest.mark.slow
def test_an_oom_kill_halves_the_micro_batch_and_the_run_resumes_from_its_checkpoint(step, program, memory_limit):
    run = step(train=64, edit=lengthen_a_quarter)
    with memory_limit(700) as prefix:
        exit_code, stdout, stderr = program(run, prefix=prefix, **LONG, seed=2).finish()
    assert exit_code == 0, stderr

    message = (
        "out of memory with a micro-batch size of 16: the kernel killed the training process at the memory limit of "
        "700 MiB"
    )
    assert f"{message}: continuing with a micro-batch size of 8, 2 per step" in stdout
    assert "resuming from checkpoint-2 of 4 steps" in stdout

    # One halving may not be enough; each has its message, in the file and on the page.
    document = run.document
    assert document["out_of_memory"][0] == message
    assert document["micro_batch_size"] == 16 // 2 ** len(document["out_of_memory"])
    assert message in (run.adapter / "report.html").read_text()
    steps = (run.adapter / "loss.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2, 3, 4]


@pytest.mark.slow
def test_an_oom_kill_with_a_micro_batch_of_one_row_ends_the_run_with_the_numbers(step, program, memory_limit):
    # 200 MiB are less than torch alone takes.
    run = step(train=64, edit=lengthen_a_quarter)
    settings = LONG | {"micro_batch_size": 1, "global_batch_size": 16}
    with memory_limit(200) as prefix:
        exit_code, _, stderr = program(run, prefix=prefix, **settings).finish()
    assert exit_code == 137, stderr
    assert stderr.splitlines()[-1] == (
        "out of memory with a micro-batch size of 1: the kernel killed the training process at the memory limit of "
        "200 MiB. A micro-batch of one row cannot be split further: lower train.rank, shorten the rows or give the "
        "step more memory"
    )


@pytest.mark.slow
def test_a_kill_that_was_not_for_memory_says_try_again(step, program):
    run = step()
    exit_code, _, stderr = program(run, "SIGKILL:5", checkpoint_minutes=1e-9).finish()
    assert exit_code == 75
    assert stderr.splitlines()[-1] == (
        "the training process was ended by SIGKILL, as happens when memory runs out. "
        "Run the same command again: it resumes from the newest checkpoint"
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
        (  # a container that sees the host's path of its group, and the group's own files at the top
            "4:memory:/kubepods/pod7",
            {"memory/memory.oom_control": "oom_kill 1\n", "memory/memory.limit_in_bytes": f"{2**63 - 4096}"},
            1, None,
        ),
        ("4:memory:/", {"memory/memory.oom_control": "under_oom 0\n"}, None, None),  # before Linux 4.13
    ],
    ids=["v2", "v2-no-limit", "v2-root", "v1", "v1-container", "v1-old"],
)  # fmt: skip
def test_kills_and_limit_are_read_from_the_files_of_either_cgroup_version(
    tmp_path, monkeypatch, line, files, kills, limit
):
    (tmp_path / "cgroup").write_text(line + "\n")
    for name, text in files.items():
        file = tmp_path / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    # Both roots stand in for /proc and /sys.
    monkeypatch.setattr(cgroup, "SELF_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(cgroup, "CGROUP_ROOT", tmp_path / "fs")
    assert cgroup.oom_kills() == kills
    assert cgroup.limit_mib() == limit


def test_without_control_groups_kills_and_limit_are_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "SELF_CGROUP", tmp_path / "none")
    assert (cgroup.oom_kills(), cgroup.limit_mib()) == (None, None)


def test_the_step_itself_imports_no_large_library():
    """The kernel kills the largest process, which must be the training process and not the step that outlives it."""
    code = "import sys, components.train_qlora.step; print(*{'torch', 'numpy', 'transformers'} & set(sys.modules))"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.split() == []
