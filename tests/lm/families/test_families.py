"""For every imitated family, a row is learnt as it is meant, or refused for a true reason."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from components.validate_data.turns import TurnParser
from qlora_retrain.lm.chat import RowRefused, load_tokenizer
from qlora_retrain.lm.chat_format import ChatFormat
from tests.lm.families.family import Family
from tests.lm.families.harness import PLANNED_DAY, Model, cell_of, encode_as_the_gate, judge_row, load_model
from tests.lm.families.imitations import BY_NAME, EXTRAS, FAMILIES
from tests.lm.families.judge import Verdict
from tests.lm.families.reading import clock
from tests.lm.families.row_reading import Reading
from tests.lm.families.rows import KINDS, UNCOUNTED, rows_of_kind
from tests.lm.families.tokenizers import write_folder

ALL = [*FAMILIES, *EXTRAS]
FINE = ("right", "refused_true")


class Models:
    """Every family's model, written and loaded once, and the verdicts on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.load = cache(self._load)
        self.judge = cache(self._judge)

    def _load(self, name: str, with_kwargs: bool = False) -> Model:
        family = BY_NAME[name]
        folder = self.folder / name
        if not folder.exists():
            write_folder(family, folder)
        return load_model(family, folder, family.kwargs if with_kwargs else None)

    def _judge(self, name: str, kind: int) -> list[tuple[Reading, Verdict]]:
        model = self.load(name)
        return [judge_row(model, row) for row in rows_of_kind(kind, model.family)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("families"))


def families(*, with_kwargs: bool = False) -> pytest.MarkDecorator:
    selected = [family for family in ALL if family.kwargs or not with_kwargs]
    return pytest.mark.parametrize("family", selected, ids=lambda family: family.name)


@families()
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_learnt_as_it_is_meant_or_refused_for_a_true_reason(models: Models, family: Family, kind: int) -> None:
    judged = models.judge(family.name, kind)
    assert {reading.row.variant: v for reading, v in judged if v.outcome not in FINE} == {}


@families()
def test_rows_are_refused_only_where_the_template_cannot_render_them(models: Models, family: Family) -> None:
    """What each template cannot do was written down by hand, beside the template."""
    # A text with a mark is refused by every family, and nothing asks for an answer that stands first.
    kinds = [kind for kind in KINDS if kind not in (12, 15, 16)]
    for kind in kinds:
        judged = models.judge(family.name, kind)
        is_refused = any(verdict.outcome != "right" for _, verdict in judged)
        assert is_refused == (kind in family.expected), kind

        # The judge reads the same in the renderings.
        must = frozenset[str]().union(*(reading.must for reading, _ in judged))
        assert must & family.expected[kind] if is_refused else not must, kind


def test_at_least_85_of_100_cells_are_right_or_refused_for_a_true_reason(models: Models) -> None:
    kinds = [kind for kind in KINDS if kind not in UNCOUNTED]
    cells = [cell_of(v for _, v in models.judge(family.name, kind)) for family in FAMILIES for kind in kinds]
    assert len(cells) == 41 * 11
    assert sum(cell.outcome in FINE for cell in cells) >= 0.85 * len(cells)


@families(with_kwargs=True)
@pytest.mark.parametrize("kind", [1, 2, 3, 6, 11])
def test_with_thinking_switched_off_every_row_is_right(models: Models, family: Family, kind: int) -> None:
    model = models.load(family.name, with_kwargs=True)
    verdicts = {row.variant: judge_row(model, row)[1] for row in rows_of_kind(kind, family)}
    assert {variant: v for variant, v in verdicts.items() if v.outcome != "right"} == {}


def test_a_stop_that_the_line_names_ends_an_answer(models: Models) -> None:
    """ERNIE's end of an answer is no stop, unless its servers are told so, and so is the line."""
    mark = "<|end_of_sentence|>"
    family = replace(BY_NAME["ernie-4.5"], stops=("</s>", mark))
    folder = write_folder(BY_NAME["ernie-4.5"], models.folder / "ernie-with-a-stop")
    chat = load_tokenizer(folder, ChatFormat(date=PLANNED_DAY, stop_tokens=(mark,)))
    model = Model(family, chat, models.load("ernie-4.5").tokenizer, {})
    for kind in (1, 2, 3, 4):
        assert [judge_row(model, row)[1] for row in rows_of_kind(kind, family)] == [Verdict("right")] * len(
            rows_of_kind(kind, family)
        )


@pytest.mark.parametrize("name", ["falcon-180b-chat", "qwen1.5", "glm-4"])
def test_an_end_is_appended_only_where_the_line_lets_it_be(models: Models, name: str) -> None:
    """Where the next turn's mark is the stop, no end is missing."""
    family = BY_NAME[name]
    models.load(name)
    chat = load_tokenizer(models.folder / name, ChatFormat(date=PLANNED_DAY, missing_end="refuse"))
    row = rows_of_kind(2, family)[0]
    if family.next_turns and "<|user|>" not in family.next_turns:
        with pytest.raises(RowRefused, match="answer_has_no_end"):
            chat.encode(row.messages)
    else:
        assert chat.encode(row.messages)[0].input_ids[-1] in chat.stop_ids


@families()
def test_many_rows_at_once_are_encoded_as_each_alone(models: Models, family: Family) -> None:
    chat = models.load(family.name).chat
    rows = [row for kind in (1, 2, 3, 5, 6) for row in rows_of_kind(kind, family)]
    together = chat.encode_many([(row.messages, row.tools) for row in rows])
    for row, result in zip(rows, together, strict=True):
        if isinstance(result, Exception):
            with pytest.raises(type(result), match=result.reason):
                chat.encode(row.messages, row.tools)
        else:
            assert result == chat.encode(row.messages, row.tools), row.variant


@families()
def test_what_earlier_chats_taught_changes_no_row(models: Models, family: Family) -> None:
    """The places of contents are taken from literals that are remembered, and else from a rendering with marks."""
    renderer = models.load(family.name).chat._renderer
    rows = [row for kind in (1, 2, 3, 4, 5, 7, 8) for row in rows_of_kind(kind, family)]
    num_remembered = 0
    for row in rows:
        for length in range(1, len(row.messages) + 1):
            chat = row.messages[:length]
            try:
                renderer.locate(chat, row.tools)
                remembered = renderer.locate(chat, row.tools)
                num_remembered += len(renderer._literals)
                renderer._literals.clear()
                assert renderer.locate(chat, row.tools) == remembered
            except RowRefused:
                continue
    assert num_remembered


def test_text_parts_reach_the_template_as_one_text() -> None:
    for row in rows_of_kind(10, BY_NAME["qwen2.5"]):
        assert TurnParser({}, ()).parse(row.parts) == (row.messages, None)


@families()
def test_a_template_that_takes_text_parts_writes_them_as_it_writes_their_text(models: Models, family: Family) -> None:
    tokenizer = models.load(family.name).tokenizer
    row = rows_of_kind(10, family)[0]
    assert row.parts
    with clock(PLANNED_DAY):
        try:
            text = tokenizer.apply_chat_template(row.parts, tokenize=False)
        # Whatever a template raises on a list, it does not take one.
        except Exception:  # noqa: BLE001
            return
    # Some write the list as Python would, and some nothing at all.
    if "type" not in text and row.messages[0]["content"] in text:
        readings = [reading for reading, _ in models.judge(family.name, 10)]
        assert readings[0].whole.text == text


@families()
def test_a_model_is_asked_for_the_answer_that_it_was_taught(models: Models, family: Family) -> None:
    chat = models.load(family.name).chat
    # Where a template cannot render one exchange, nothing is taught.
    for row in rows_of_kind(2, family) if 2 not in family.expected else []:
        (example,) = encode_as_the_gate(chat, row)
        answer = row.messages[-1]
        prompt_ids = chat.prompt_ids(row.messages[:-1], answer=answer)
        assert prompt_ids + chat.answer_ids(row.messages[:-1], answer) == example.input_ids
        assert example.supervised == [i >= len(prompt_ids) for i in range(len(example.input_ids))]


@families()
def test_generation_stops_where_the_servers_of_the_family_stop(models: Models, family: Family) -> None:
    model = models.load(family.name)
    assert sorted(model.tokenizer.convert_ids_to_tokens(model.chat.stop_ids)) == sorted(family.stops)


def test_a_cell_is_as_good_as_its_worst_variant() -> None:
    verdicts = [Verdict("right"), Verdict("wrong", "(b)"), Verdict("refused_true")]
    assert cell_of(verdicts) == Verdict("wrong", "(b)")
