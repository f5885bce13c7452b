"""Tool calls in the forms that families write: equal as JSON, whatever their order and white space."""

from __future__ import annotations

import pytest

from qlora_retrain.evaluation.metrics import completion_metrics
from qlora_retrain.evaluation.metrics.call_metrics import RenderedCalls

HERMES = '<tool_call>\n{"name": "look", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
MISTRAL = '[TOOL_CALLS][{"name": "look", "arguments": {"city": "Rome"}, "id": "abc123def"}]'
LLAMA = '{"name": "look", "parameters": {"city": "Rome"}}'
KIMI = '<|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|>'
PYTHONIC = '[look(city="Rome", days=2)]'
XML = "<tool_call>look\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>"
AS_TEXT = '<tool_call>{"name": "look", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>'


@pytest.mark.parametrize(
    ("answer", "completion", "same"),
    [
        (HERMES, HERMES, True),
        (HERMES, '<tool_call>{"arguments":{"days":2,"city":"Rome"},"name":"look"}</tool_call>', True),
        (HERMES, HERMES.replace("2", "3"), False),
        (HERMES, HERMES.replace("2", '"2"'), False),
        (HERMES, HERMES.replace("2", "true"), False),
        (HERMES, HERMES.replace("look", "find"), False),
        (HERMES, HERMES + "\n" + HERMES, False),
        (HERMES + "\n" + HERMES.replace("Rome", "Oslo"), HERMES.replace("Rome", "Oslo") + "\n" + HERMES, False),
        # Without the marks no server would find the call.
        (HERMES, '{"name": "look", "arguments": {"city": "Rome", "days": 2}}', False),
        (HERMES, HERMES.removesuffix("</tool_call>"), False),
        (MISTRAL, MISTRAL.replace("abc123def", "000000000"), True),
        (MISTRAL, MISTRAL.replace("Rome", "Oslo"), False),
        (LLAMA, '{"parameters": {"city": "Rome"}, "name": "look"}', True),
        (LLAMA, "I would call look.", False),
        (KIMI, KIMI.replace('{"city": "Rome"}', '{ "city":"Rome" }'), True),
        (KIMI, KIMI.replace("look:0", "find:0"), False),
        (PYTHONIC, PYTHONIC, True),
        (PYTHONIC, PYTHONIC.replace("2", "3"), False),
        (XML, XML.replace("\n", "  "), True),
        (XML, XML.replace("Rome", "Oslo"), False),
        (AS_TEXT, AS_TEXT.replace("\\\"city\\\": ", "\\\"city\\\":"), True),
        (AS_TEXT, '<tool_call>{"name": "look", "arguments": {"city": "Rome"}}</tool_call>', True),
        # An argument that is text stays text.
        ('{"name": "a", "arguments": {"q": "[1]"}}', '{"name": "a", "arguments": {"q": [1]}}', False),
        # Half a call, as after a cut.
        (HERMES, HERMES[:30], False),
        (HERMES, "[" * 3000, False),
    ],
)  # fmt: skip
def test_calls_are_the_same_where_names_and_arguments_are(answer: str, completion: str, same: bool) -> None:
    calls = RenderedCalls(answer, completion)
    assert calls.has_same_calls() is same
    assert calls.is_exact() is same


def test_what_is_said_before_a_call_counts_for_an_exact_match_alone() -> None:
    answer, completion = f"Let me look.\n{HERMES}", f"One moment please.\n{HERMES}"
    calls = RenderedCalls(answer, completion, "Let me look.")
    assert calls.has_same_calls()
    assert not calls.is_exact()
    assert not RenderedCalls(answer, completion.replace("Rome", "Oslo"), "Let me look.").has_same_calls()
    # The mark before the call must still be there.
    assert not RenderedCalls(answer, completion.replace("<tool_call>", ""), "Let me look.").has_same_calls()


def test_the_metric_is_defined_for_answers_with_calls_alone() -> None:
    names = ("exact_match", "tool_call_match", "rouge_l")
    reordered = '<tool_call>{"arguments":{"days":2,"city":"Rome"},"name":"look"}</tool_call>'
    values = completion_metrics.compute(names, HERMES, reordered, RenderedCalls(HERMES, reordered))
    assert values["exact_match"] == values["tool_call_match"] == 1.0
    assert set(completion_metrics.compute(names, "yes", "yes")) == {"exact_match", "rouge_l"}
