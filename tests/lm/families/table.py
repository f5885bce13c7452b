"""Print the table of families and kinds of rows as Markdown, for `docs/compatibility.md`.

Command: python -m tests.lm.families.table
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.lm.families.family import Family
from tests.lm.families.harness import cell_of, load_model, verdicts_of
from tests.lm.families.imitations import EXTRAS, FAMILIES
from tests.lm.families.judge import Verdict
from tests.lm.families.rows import KINDS, UNCOUNTED
from tests.lm.families.tokenizers import write_folder

# A short name of each reason, for the cells.
REASONS = {
    "template_drops_text": "drops",
    "template_rewrites_text": "rewrites",
    "template_refuses": "raises",
    "answer_end_is_no_stop": "no stop",
    "answer_inside_reasoning": "inside",
    "mark_in_text": "mark",
    "tools_unsupported": "tools",
}


def table(families: Iterable[Family]) -> str:
    """Return a Markdown table: a row a family, a column a kind, and each cell `yes` or the reason of the refusal."""
    kinds = list(KINDS)
    lines = [
        "| family | " + " | ".join(str(kind) for kind in kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    outcomes = Counter[str]()
    with tempfile.TemporaryDirectory() as root:
        for family in families:
            verdicts = verdicts_of(load_model(family, write_folder(family, Path(root) / family.name)))
            outcomes.update(cell_of(verdicts[kind]).outcome for kind in kinds if kind not in UNCOUNTED)
            lines.append(f"| {family.name} | " + " | ".join(_cell(verdicts[kind]) for kind in kinds) + " |")
    total = sum(outcomes.values())
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    return "\n".join([*lines, "", f"Of {total} cells (kinds {_listed(UNCOUNTED)} apart): {counts}."])


def legend() -> str:
    """Return what the columns and the cells mean."""
    columns = "; ".join(f"{kind} {text}" for kind, text in KINDS.items())
    cells = ", ".join(f"{short}: `{reason}`" for reason, short in REASONS.items())
    return f"Rows: {columns}.\n\nCells: yes, or why all or some variants of the row are refused; {cells}."


def _cell(verdicts: list[Verdict]) -> str:
    """Return `yes`, the reasons for which some or all variants are refused, or a fault in capitals."""
    worst = cell_of(verdicts)
    if worst.outcome not in ("right", "refused_true"):
        return worst.outcome.upper()
    reasons = dict.fromkeys(REASONS.get(v.detail, v.detail) for v in verdicts if v.outcome != "right")
    is_part = any(v.outcome == "right" for v in verdicts)
    return " / ".join(["yes"] * is_part + list(reasons))


def _listed(kinds: Iterable[int]) -> str:
    return ", ".join(str(kind) for kind in kinds)


if __name__ == "__main__":
    print(legend(), table(FAMILIES), table(EXTRAS), sep="\n\n")
