"""The table of `methods.py`: each method beside what the literature claims of it, judged on the same rows.

A claim is held where the whole interval of the difference lies on its side, and not held where all of it lies on the
other. Where the interval has both, the rows and seeds cannot tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95
# Two methods are called equal in the literature within about a point; 1.2 is QLoRA's distance in another routing task.
MARGIN = 0.012
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """What the literature says of a point.

    Attributes:
        point: The name of the point.
        text: The claim, with its source.
        rival: The point that it is compared with.
        margin: How many points of accuracy / 100 it may be behind; below 0: it must be ahead.
    """

    point: str
    text: str
    rival: str
    margin: float = MARGIN


CLAIMS = (
    Claim("lora", "4 bits cost nothing: as good as LoRA over 16 bits (arXiv 2305.14314)", "lora over 16 bits"),
    Claim("lora", "as good as full fine-tuning in 16 bits (arXiv 2305.14314)", "full"),
    Claim("lora over 16 bits", "within 1.2 points of full fine-tuning (arXiv 2106.09685)", "full"),
    Claim("lora", "NF4 is better than FP4 (arXiv 2305.14314)", "lora over fp4", 0.0),
    Claim(
        "rslora, rank 64, alpha 8",
        "better than LoRA at high ranks, with the alpha of a low one (arXiv 2312.03732)",
        "lora, rank 64, alpha 32",
        0.0,
    ),
    Claim("lora+", "1 to 2 points better than LoRA at equal steps (arXiv 2402.12354)", "lora", 0.0),
    Claim("dora", "better than LoRA at equal rank (arXiv 2402.09353)", "lora", 0.0),
    Claim("adalora", "better than LoRA at an equal budget (arXiv 2303.10512)", "lora", 0.0),
    Claim("qdylora", "as good as QLoRA at the full rank (arXiv 2402.10462)", "lora"),
    *(
        Claim(f"qdylora, first {n}", "one training serves every rank (arXiv 2210.07558)", f"lora, rank {n}")
        for n in (2, 4, 8)
    ),
    Claim("lora-xs, rank 64", "as good as LoRA with a hundredth of the parameters (arXiv 2405.17604)", "lora"),
    Claim("loftq", "better than QLoRA at 4 bits (arXiv 2310.08659)", "lora", 0.0),
    Claim("lq-lora", "better than QLoRA (arXiv 2311.12023)", "lora", 0.0),
    Claim("qa-lora", "as good as QLoRA, and stays in 4 bits when merged (arXiv 2309.14717)", "lora over int4"),
    Claim("ir-qlora", "better than QLoRA (arXiv 2402.05445)", "lora", 0.0),
    Claim("ia3", "as good as full fine-tuning on few examples (arXiv 2205.05638)", "full"),
    Claim("bottleneck, 64 wide", "within 0.4 points of full fine-tuning (arXiv 1902.00751)", "full", 0.004),
    Claim("prefix", "as good as full fine-tuning (arXiv 2101.00190)", "full"),
)
NOT_TESTABLE = {"prompt": "as good as full fine-tuning above 10 billion weights (arXiv 2104.08691)"}


def is_mergeable(settings: Sequence[tuple[str, Any]]) -> bool:
    """Return whether the method of a point becomes part of the base's weights."""
    from qlora_retrain.config.methods import METHODS

    return METHODS[dict(settings)["train.method"]].merges == "yes"


def render(results: Sequence[Result], speeds: Sequence[Result]) -> str:
    """Return the tables in Markdown: the methods, the best first, the claims, and the base formats."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result["name"], []).append(result)
    tokens_per_second = {result["name"]: result["numbers"]["tokens_per_second"] for result in speeds}
    rows = [
        _method_row(name, of_name, tokens_per_second.get(name))
        for name, of_name in sorted(by_name.items(), key=lambda item: -_accuracy(item[1]).value)
    ]
    headers = (
        "method", "seeds", "accuracy", "loss", "weights trained", "adapter, MiB", "memory, MiB", "tokens/s",
        "merging, nats", "forgetting, nats",
    )  # fmt: skip
    return "\n\n".join([_table(headers, rows), _claims(by_name), _formats(by_name), _provenance(results)])


def _method_row(name: str, results: Sequence[Result], tokens_per_second: float | None) -> list[str]:
    accuracy, loss = _accuracy(results), _loss(results)
    first = min(results, key=lambda result: result["seed"])["numbers"]
    forgotten = [result["numbers"]["forgetting_nats"] for result in results]
    return [
        name,
        str(len(results)),
        f"{accuracy.value:.1%} ({accuracy.low * 100:.1f} to {accuracy.high * 100:.1f})",
        f"{loss.value:.3f} ({loss.low:.3f} to {loss.high:.3f})",
        f"{first['trainable_parameters']:,} ({_trained_share(results[0]):.2%})",
        f"{first['adapter_bytes'] / 2**20:.1f}",
        f"{first['peak_memory_mib']:,.0f}",
        "" if tokens_per_second is None else f"{tokens_per_second:.0f}",
        "" if first["merge_loss_nats"] is None else f"{first['merge_loss_nats']['value']:+.4f}",
        f"{sum(f['value'] for f in forgotten) / len(forgotten):+.2f}" if all(forgotten) else "",
    ]


def _accuracy(results: Sequence[Result]) -> Any:
    from qlora_retrain.evaluation import clusters, stats

    rows = [row for result in results for row in result["rows"].values()]
    hits, prompts = [int(row[0]) for row in rows], [row[3] for row in rows]
    effect = clusters.design_effect(hits, prompts, extremes=(0.0, 1.0))
    return stats.proportion_interval(sum(hits), len(hits), confidence=CONFIDENCE, design_effect=effect)


def _loss(results: Sequence[Result]) -> Any:
    from qlora_retrain.config.evaluate import EvaluateConfig
    from qlora_retrain.evaluation import bootstrap

    rows = [row for result in results for row in result["rows"].values()]
    settings = bootstrap.BootstrapSettings.from_config(EvaluateConfig())
    losses, tokens, prompts = ([row[column] for row in rows] for column in (1, 2, 3))
    return bootstrap.ratio_interval(losses, tokens, settings, prompts)


def _claims(by_name: Mapping[str, Sequence[Result]]) -> str:
    rows = []
    for claim in CLAIMS:
        if claim.point in by_name and claim.rival in by_name:
            gain = difference(by_name[claim.point], by_name[claim.rival])
            points = f"{gain.value * 100:+.1f} ({gain.low * 100:+.1f} to {gain.high * 100:+.1f})"
            nats = loss_difference(by_name[claim.point], by_name[claim.rival])
            loss = f"{nats.value:+.3f} ({nats.low:+.3f} to {nats.high:+.3f})"
            rows.append([claim.point, claim.text, f"{points} against {claim.rival}", loss, judge(claim, gain)])
    rows += [
        [name, text, "", "", "not testable with this base"] for name, text in NOT_TESTABLE.items() if name in by_name
    ]
    headers = ("method", "the literature's claim", "points of accuracy here", "loss here, nats per token", "verdict")
    return _table(headers, rows)


def difference(ours: Sequence[Result], theirs: Sequence[Result]) -> Any:
    """Return how much more often one point is right than another, on the same rows and seeds, with its interval."""
    from qlora_retrain.evaluation import stats

    pairs = _same_rows(ours, theirs)
    right, rival_right = ([bool(row[0]) for row in rows] for rows in zip(*pairs, strict=True))
    prompts = [row[3] for row, _ in pairs]
    return stats.paired_proportion_interval(right, rival_right, confidence=CONFIDENCE, prompts=prompts)


def loss_difference(ours: Sequence[Result], theirs: Sequence[Result]) -> Any:
    """Return how much higher the loss of one point is than another's, on the same rows and seeds, in nats per token."""
    from qlora_retrain.config.evaluate import EvaluateConfig
    from qlora_retrain.evaluation import bootstrap

    pairs = _same_rows(ours, theirs)
    settings = bootstrap.BootstrapSettings.from_config(EvaluateConfig())
    nats, tokens = [row[1] - rival[1] for row, rival in pairs], [row[2] for row, _ in pairs]
    return bootstrap.difference_interval(nats, tokens, settings, prompts=[row[3] for row, _ in pairs])


def _same_rows(ours: Sequence[Result], theirs: Sequence[Result]) -> list[tuple[Any, Any]]:
    rivals = {result["seed"]: result for result in theirs}
    return [
        (row, rivals[result["seed"]]["rows"][row_id])
        for result in ours
        if result["seed"] in rivals
        for row_id, row in result["rows"].items()
    ]


def judge(claim: Claim, gain: Any) -> str:
    """Return whether the difference holds the claim; see the module."""
    if gain.low > -claim.margin:
        return "held"
    return "not held" if gain.high < -claim.margin else "these rows cannot tell"


def _formats(by_name: Mapping[str, Sequence[Result]]) -> str:
    """Return the packed bases, one row for each: bits, and the error of the weights before training.

    A start that is made of the original weights (LoftQ's) is beside the error of the packed weights alone.
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, results in by_name.items():
        packed = results[0]["quantization"]
        if not packed["quantized_weights"]:
            continue
        with_start = packed.get("relative_error_with_start")
        without = packed.get("relative_error_without_start", packed["relative_error"])
        errors = (f"{without:.4f}", "" if with_start is None else f"{with_start:.4f}")
        rows.setdefault((f"{packed['bits_per_weight']:.3f}", *errors), []).append(name)
    headers = ("points", "bits per weight", "error of the weights before training", "with the adapter's start")
    return _table(headers, [[", ".join(names), *numbers] for numbers, names in sorted(rows.items())])


def _trained_share(result: Result) -> float:
    """Return the trainable weights as a share of the base's, which has 2 bytes for each."""
    return float(result["numbers"]["trainable_parameters"] / (result["quantization"]["base_bytes"] / 2))


def _provenance(results: Sequence[Result]) -> str:
    values = {
        name: sorted({str(result[name]) for result in results}) for name in ("date", "commit", "machine", "steps")
    }
    return "; ".join(f"{name}: {', '.join(of_name)}" for name, of_name in values.items())


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
