"""Lay out the reports of the steps, with every section, in a browser, wide and narrow."""

from __future__ import annotations

import html
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from components.evaluate.step import run as evaluate
from components.merge_adapter.step import run as merge
from components.validate_data.step import run as validate
from qlora_retrain.config.data import DataConfig
from qlora_retrain.config.sections import EvaluateConfig, MergeConfig
from qlora_retrain.lm import conversations

# Longer than a line on a telephone, with and without a place to break it.
LABELS = ["refund", "delivery", "login", "declined_cash_withdrawal_from_an_unsupported_machine"]
QUESTIONS = {
    "refund": "my money back of order number {}",
    "delivery": "where is the parcel of order number {}",
    "login": "I cannot sign in of order number {}",
    LABELS[3]: "https://shop.example/orders/with/a/very/long/path/that/nobody/breaks/{} does not open, my money back",
}


def make_row(number: int) -> dict[str, object]:
    """Make a ticket; every fourth has a label that the adapter did not learn."""
    label = LABELS[number % 4]
    question = {"role": "user", "content": QUESTIONS[label].format(1000 + number)}
    messages = [question, {"role": "assistant", "content": label}]
    return {"id": conversations.row_id(messages), "messages": messages}


def write_profile(folder: Path, counts: tuple[int, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.json").write_text(
        json.dumps({"distributions": {"label": dict(zip(LABELS, counts, strict=True)), "language": {"latin": 400}}})
    )


@pytest.fixture(scope="module")
def pages(
    tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path, write_reference: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:  # fmt: skip
    """Make the reports of real steps that have content for every section."""
    folder = tmp_path_factory.mktemp("screens")
    dataset, version, reference = folder / "dataset", folder / "version", folder / "reference"
    evaluation, model = folder / "evaluation", folder / "model"
    for path in (dataset, version, reference, evaluation, model):
        path.mkdir()

    for name, numbers in {"train": range(500, 520), "eval": range(64), "golden": range(100, 112)}.items():
        (dataset / f"{name}.jsonl").write_text("".join(json.dumps(make_row(i)) + "\n" for i in numbers))
    (dataset / "dataset.json").write_text(json.dumps({"labels": LABELS, "max_length_tokens": 128}))
    write_profile(dataset, (100, 100, 100, 100))
    write_profile(version / "data", (250, 20, 100, 30))
    (version / "model").symlink_to(tiny_model)
    write_reference(reference)
    inputs = {"base_model": tiny_model, "base_nf4": tiny_nf4, "adapter": tiny_adapter, "reference_data": reference}

    # Every optional metric, floor and rule is on, so that no section is empty.
    settings = EvaluateConfig(
        device="cpu", bootstrap_samples=200, text_in_reports=True, max_new_tokens=12, min_slice_prompts=8,
        metrics=("loss", "perplexity", "accuracy", "macro_f1", "exact_match", "rouge_l", "chrf"),
        floors={"rouge_l": 0.5}, min_accuracy=0.9, slice_floor=0.3, max_forgetting_nats=9.0,
        max_forgetting_accuracy=0.9, max_train_eval_gap_nats=1.0, train_rows=16,
    )  # fmt: skip
    evaluate(settings, dataset, **inputs, champion=version, anchor=version, golden_data=None, evaluation=evaluation)

    exports = MergeConfig(device="cpu", exports=["bf16", "nf4", "gguf-f16", "gguf-q8_0", "gguf-q4_0"],
                          max_kl_nats=0.5, min_agreement=0.5, max_export_loss_increase_nats=0.2,
                          rank="smallest")  # fmt: skip
    merge(exports, dataset, **inputs, evaluation=evaluation, model=model)
    return {
        "evaluation": evaluation / "report.html",
        "merge": model / "report.html",
        "data": validate_rows(folder, tiny_model) / "report.html",
    }


def validate_rows(folder: Path, base_model: Path) -> Path:
    """Run the data gate on odd rows beside other data of an earlier version, so that its page has every section."""
    folders = {name: folder / f"data-{name}" for name in ("raw", "golden", "reference", "dataset")}
    for path in folders.values():
        path.mkdir()
    rows = [make_row(i) | {"a_column_that_nothing_reads_and_that_has_a_long_name": "x"} for i in range(300)]
    rng = random.Random(1)
    for row in rng.sample(rows, 60):
        row["messages"][1]["content"] = rng.choice(LABELS)  # type: ignore[index]
    rows += [make_row(i) for i in range(3)] + [{"messages": [{"role": "user", "content": "no answer"}]}]
    rows += [{"messages": [{"role": "user", "content": "long " * 3000}, {"role": "assistant", "content": "refund"}]}]
    name = "a_file_with_a_long_name_" * 3 + ".jsonl"
    (folders["raw"] / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folders["golden"] / "golden.jsonl").write_text(json.dumps(make_row(900)) + "\n")
    write_profile(folders["reference"] / "data", (250, 20, 100, 30))
    config = DataConfig(
        task="labels", split_seed="screens", min_eval_prompts=5, reference_version="20260131T000000Z-0123456789ab",
        checks={"near_evaluation": "warn"}, max_duplicates_fraction=0.9, label_error_threshold=0.001,
    )  # fmt: skip
    validate(
        config, raw_data=folders["raw"], base_model=base_model, golden_data=folders["golden"],
        reference_profile=folders["reference"], eval_data=None, evaluation_history=None, dataset=folders["dataset"],
    )  # fmt: skip
    return folders["dataset"]


def laid_out_width(page: Path, width: int, work: Path) -> int:
    """Return the width in pixels that the page takes in a browser's window of `width` pixels."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        missing = "no Chromium to look at the pages with: apt install chromium"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)

    # A window cannot be as narrow as a telephone, a frame can; and a script may measure the document of a frame.
    frame = html.escape(page.read_text(encoding="utf-8"), quote=True)
    (work / "frame.html").write_text(
        f'<iframe id="page" width="{width}" height="900" style="border:0" srcdoc="{frame}"></iframe><p id="seen"></p>'
        "<script>onload = () => { const seen = document.getElementById('page').contentDocument.documentElement;"
        "document.getElementById('seen').textContent = seen.scrollWidth + ' of ' + seen.clientWidth; }</script>",
        encoding="utf-8",
    )

    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={work / 'profile'}", "--dump-dom"]
    process = subprocess.run(
        [browser, *options, (work / "frame.html").as_uri()], capture_output=True, text=True, timeout=500
    )
    widths = re.search(r'<p id="seen">(\d+) of (\d+)</p>', process.stdout)
    assert widths, process.stderr
    assert int(widths[2]) >= width - 20  # the frame has the requested width, except for a scroll bar
    return int(widths[1])


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["evaluation", "merge", "data"])
def test_no_page_is_wider_than_its_window(pages: dict[str, Path], tmp_path: Path, name: str, width: int) -> None:
    assert laid_out_width(pages[name], width, tmp_path) <= width


@pytest.mark.slow
def test_the_pages_have_every_section(pages: dict[str, Path]) -> None:
    headings = {name: re.findall(r"<h2>(.*?)</h2>", page.read_text()) for name, page in pages.items()}
    assert headings["evaluation"] == [
        "The challenger compared with the other contestants",
        "Rules",
        "Evaluation rows",
        "Golden rows",
        "Reference text: forgetting",
        "Slices, worst first",
        "Accuracy of the challenger by label, worst first",
        "Confusions that changed from the champion",
        "Completions of the golden rows, most changed first",
        "Overfitting: loss on evaluation rows and on training rows",
        "Intruder dimensions by layer",
        "Data drift since the champion",
    ]
    assert headings["merge"] == [
        "Rules",
        "Selected form",
        "What a smaller rank costs",
        "Golden rows",
        "Reference text",
        "Exported forms",
        "Serving the adapter without merging",
        "Merge statistics",
    ]
    assert headings["data"] == [
        "Look at these first",
        "From the files to the data set",
        "What each side holds",
        "Rules about what rows say",
        "Lengths",
        "Labels",
        "Labels that are probably wrong",
        "Languages",
        "Drift from the reference",
        "Limits",
        "What was taken as the chat",
        "Columns that nothing reads",
        "What this page is about",
    ]
