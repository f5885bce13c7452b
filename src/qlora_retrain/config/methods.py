"""What each method of `train.method` can do: data for the table, and for refusing what cannot work before it starts.

Where a method is served says what reads the adapter as it ships. The merged model is served wherever its family is.
What cannot be merged ships as an adapter alone, which is served over the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FOUR_BITS = ("nf4", "fp4", "int4", "nf4-shifted")
PACKED = (*FOUR_BITS, "mixed")
ALL_FORMATS = ("none", *PACKED)
NOT_YET = "not yet run"
# Of LoRA, and the default of `train.learning_rate`. The others' are in the range of their papers' and were tried on
# SmolLM2 (`benchmarks/methods.py --choose`).
ADAPTER_RATE = 2e-4

Answer = Literal["yes", "no"]


@dataclass(frozen=True, slots=True)
class MethodFacts:
    """What a method can do.

    Attributes:
        name: The value of `train.method`.
        idea: What it does, in a few words.
        formats: The base formats (`quantize.format`) over which it trains.
        ships_as: The form of the adapter in a version.
        merges: Whether the update becomes part of the base's weights.
        ships_alone: Whether a version has the adapter without a model, since nothing can be merged.
        peft: Whether PEFT loads the adapter.
        vllm: Whether vLLM serves it.
        llama_cpp: Whether llama.cpp can: its converter writes it as a GGUF adapter.
        fused: Whether training computes it in the fused layers.
        gpu: Whether it has run on a GPU.
        goes_on: Whether training can start from an adapter that ships (`train.start: champion`).
        joins: Whether adapters can be averaged (`merge.soup`).
    """

    name: str
    idea: str
    formats: tuple[str, ...] = ALL_FORMATS
    ships_as: str = "LoRA"
    merges: Answer = "yes"
    ships_alone: bool = False
    peft: Answer = "yes"
    vllm: Answer = "yes"
    llama_cpp: Answer = "yes"
    fused: str = "yes"
    gpu: str = NOT_YET
    learning_rate: float = ADAPTER_RATE
    goes_on: Answer = "no"
    joins: Answer = "yes"

    def refusal(self, base_format: str) -> str | None:
        """Return why the method cannot train over a base of this format, and what is nearest; None where it can."""
        if base_format in self.formats:
            return None
        *others, last = self.formats
        formats = f"{', '.join(others)} or {last}" if others else last
        return (
            f"train.method: {self.name} trains over {formats}, and quantize.format is {base_format}; "
            f"set quantize.format: {self.formats[0]}, or train.method: {_NEAREST.get(self.name, 'lora')}"
        )

    def start_refusal(self, start: str) -> str | None:
        """Return why training cannot start from this; None where it can."""
        if start == "base" or self.goes_on == "yes":
            return None
        return (
            f"train.start: {start} goes on from the A and B that ship, and an adapter of train.method: {self.name} "
            f"trains in another form; set train.start: base, or train.method: {_listed(GOING_ON)}"
        )

    def soup_refusal(self, soup: int | None) -> str | None:
        """Return why so many adapters cannot be averaged; None where they can."""
        if soup is None or self.joins == "yes":
            return None
        return (
            f"merge.soup: {soup} averages B A of several adapters, and what train.method: {self.name} ships is more "
            "than B A; leave merge.soup out, or set train.method: lora"
        )


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


METHODS: dict[str, MethodFacts] = {
    facts.name: facts
    for facts in (
        MethodFacts("lora", "alpha/rank times B A is added to each layer", goes_on="yes"),
        MethodFacts("rslora", "alpha/sqrt(rank) times B A, for high ranks", goes_on="yes"),
        MethodFacts("lora+", "as lora, and B learns faster than A", goes_on="yes", learning_rate=5e-5),
        MethodFacts(
            "dora", "direction and length of each row learn apart", ships_as="DoRA", vllm="no", llama_cpp="no",
            fused="yes, and each output is kept once more", joins="no",
        ),
        MethodFacts("adalora", "the budget of rank moves between layers while they train"),
        MethodFacts(
            "dylora", "each step trains another rank, so that every smaller one works too", ships_as="LoRA, any rank"
        ),
        MethodFacts("qdylora", "dylora over a 4-bit base", formats=FOUR_BITS, ships_as="LoRA, any rank"),
        MethodFacts(
            "qa-lora", "A sees sums of 32 inputs, so that the trained model stays in 4 bits", formats=("int4",)
        ),
        MethodFacts(
            "lora-xs", "only rank x rank numbers learn, between the base's largest singular vectors", formats=PACKED,
            learning_rate=4e-3,
        ),
        MethodFacts("loftq", "the adapter starts from what quantization loses", formats=PACKED, joins="no"),
        MethodFacts(
            "lq-lora", "as loftq, with the largest singular vectors first, over 4 and 8 bits by layer",
            formats=("mixed", *FOUR_BITS), joins="no",
        ),
        MethodFacts("ir-qlora", "averages of a layer's input pass through the adapter too", formats=ALL_FORMATS),
        MethodFacts(
            "ia3", "scales of keys, values and the MLP's inner numbers learn", ships_as="IA3", vllm="no",
            llama_cpp="no", fused="no", joins="no", learning_rate=1e-2,
        ),
        MethodFacts(
            "prompt", "the embeddings of a few virtual tokens before each row learn", ships_as="a prompt alone",
            merges="no", ships_alone=True, vllm="no", llama_cpp="no", fused="no layer is adapted", joins="no",
            learning_rate=3e-2,
        ),
        MethodFacts(
            "prefix", "keys and values of a few virtual tokens learn in each layer", ships_as="a prefix alone",
            merges="no", ships_alone=True, vllm="no", llama_cpp="no", fused="no, and rows are padded", joins="no",
            learning_rate=1e-2,
        ),
        MethodFacts(
            "bottleneck", "a small network behind each MLP learns", ships_as="a bottleneck alone", merges="no",
            ships_alone=True, peft="no", vllm="no", llama_cpp="no", fused="no layer is adapted", joins="no",
            learning_rate=1e-3,
        ),
        MethodFacts(
            "full", "no adapter, all weights learn", formats=("none",), ships_as="the model", merges="no", peft="no",
            vllm="no", llama_cpp="no", fused="no", joins="no", learning_rate=2e-5,
        ),
    )
}  # fmt: skip
GOING_ON = tuple(facts.name for facts in METHODS.values() if facts.goes_on == "yes")
_NEAREST = {"qdylora": "dylora"}
_COLUMNS = (
    "method",
    "idea",
    "over",
    "ships as",
    "merges",
    "PEFT",
    "vLLM",
    "llama.cpp",
    "fused",
    "goes on",
    "joins",
    "GPU",
)


def table() -> list[tuple[str, ...]]:
    """Return the table as rows of cells, its head first."""
    return [
        _COLUMNS,
        *(
            (
                facts.name, facts.idea, _format_names(facts.formats), facts.ships_as, facts.merges, facts.peft,
                facts.vllm, facts.llama_cpp, facts.fused, facts.goes_on, facts.joins, facts.gpu,
            )
            for facts in METHODS.values()
        ),
    ]  # fmt: skip


def _format_names(formats: tuple[str, ...]) -> str:
    """Return the formats as a cell has them: by a common word where they are all of a kind."""
    names = {ALL_FORMATS: "all", PACKED: "all but none", FOUR_BITS: "all in 4 bits"}
    return next((name for kind, name in names.items() if set(kind) == set(formats)), ", ".join(formats))
