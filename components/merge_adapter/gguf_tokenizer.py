"""Write a tokenizer into the header of a GGUF file: tokens, merges or scores, chat template, ends of an answer."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf

from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import chat, gguf_names
from qlora_retrain.lm.chat import ChatTokenizer, RowRefused


def backend_tokenizer(model: Path) -> dict[str, Any]:
    """Return the JSON of the loaded tokenizer; a model family's class can change what tokenizer.json says."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError("merge.exports: GGUF needs a fast tokenizer (tokenizer.json); the base has a slow one")
    document: dict[str, Any] = json.loads(backend.to_str())
    return document


def add_tokenizer(writer: gguf.GGUFWriter, model: Path, vocab_size: int) -> list[str]:
    """Add the tokens, the chat template and every token that ends an answer.

    Returns:
        What the file's user must know, in one sentence each.
    """
    document, chat_tokenizer = backend_tokenizer(model), chat.load_tokenizer(model)
    tokenizer = chat_tokenizer.tokenizer

    if name := gguf_names.model_name(document):
        writer.add_name(name)
    if gguf_names.sentencepiece_prefix(document):
        _add_sentencepiece(writer, document, vocab_size)
    else:
        _add_byte_level(writer, document, vocab_size)
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    notes = [
        *_add_ends(writer, chat_tokenizer),
        *gguf_names.reading_differences(document),
        *_chat_notes(chat_tokenizer, document),
    ]

    writer.add_add_bos_token(_adds_bos(chat_tokenizer))
    template = tokenizer.chat_template
    named = [{"name": name, "template": text} for name, text in template.items()] if isinstance(template, dict) else ()
    writer.add_chat_template(named or template)
    return notes


def _adds_bos(tokenizer: ChatTokenizer) -> bool:
    """Return whether llama.cpp is to put a BOS before every text: where the tokenizer does, and training had one.

    llama.cpp puts it before a chat too, unless the template has it. A template without one, such as Zephyr's, was
    trained without.
    """
    bos = tokenizer.tokenizer.bos_token_id
    if bos is None or tokenizer.tokenizer("a")["input_ids"][0] != bos:
        return False
    return _first_id(tokenizer) in (None, bos)


def _first_id(tokenizer: ChatTokenizer) -> int | None:
    """Return the first token of a chat; None where the template refuses a chat of one turn."""
    try:
        return tokenizer.prompt_ids([{"role": "user", "content": "a"}])[0]
    except RowRefused:
        return None


def _add_byte_level(writer: gguf.GGUFWriter, document: Mapping[str, Any], vocab_size: int) -> None:
    tokens, types = _tokens(document, vocab_size)
    # Old versions of tokenizers write a merge as one string, new ones as a pair.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")  # GGUF's word for byte-level BPE
    writer.add_tokenizer_pre(gguf_names.pre_tokenizer_name(document))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)


def _add_sentencepiece(writer: gguf.GGUFWriter, document: Mapping[str, Any], vocab_size: int) -> None:
    """Add a SentencePiece vocabulary, whose merges llama.cpp finds by the score of what they give.

    Raises:
        UsageError: If the merges of a tokenizer.json are in an order that no scores give.
    """
    tokens, types = _tokens(document, vocab_size)
    for i, token in enumerate(tokens):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token) and types[i] == gguf.TokenType.NORMAL:
            types[i] = gguf.TokenType.BYTE
        # A token that is matched before the spaces are marked has them as they are in the text.
        if types[i] == gguf.TokenType.USER_DEFINED:
            tokens[i] = token.replace(gguf_names.SPACE_MARK, " ")
    unknown = document["model"].get("unk_token")
    if unknown in tokens:
        types[tokens.index(unknown)] = gguf.TokenType.UNKNOWN
        writer.add_unk_token_id(tokens.index(unknown))

    ranks = _merge_ranks(document)
    writer.add_tokenizer_model("llama")  # GGUF's word for SentencePiece
    writer.add_tokenizer_pre(gguf_names.SENTENCEPIECE)
    writer.add_token_list(tokens)
    # The first merge has the highest score; what no merge gives is never compared.
    writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
    writer.add_token_types(types)
    # llama.cpp puts the space before every text between special tokens. Of a chat, which begins with such a token, that
    # is right for `always` alone.
    writer.add_add_space_prefix(gguf_names.sentencepiece_prefix(document) == "always")


def _merge_ranks(document: Mapping[str, Any]) -> dict[str, int]:
    """Return the rank of every token that merges give."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in document["model"]["merges"]]
    ranks: dict[str, int] = {}
    last = ""
    for left, right in pairs:
        token = left + right
        if token != last and token in ranks:
            raise UsageError(
                f"merge.exports: GGUF stores one score for a token, and the tokenizer merges {token!r} in two places; "
                "remove the gguf exports from the list"
            )
        ranks.setdefault(token, len(ranks))
        last = token
    return ranks


def _tokens(document: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Return the text and the type of every token."""
    # Embeddings may have more rows than the tokenizer has tokens; llama.cpp needs a name for each row.
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, i in document["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    # llama.cpp does not print control tokens, so special tokens do not appear in answers.
    for added_token in document["added_tokens"]:
        tokens[added_token["id"]] = added_token["content"]
        types[added_token["id"]] = gguf.TokenType.CONTROL if added_token["special"] else gguf.TokenType.USER_DEFINED
    return tokens, types


def _add_ends(writer: gguf.GGUFWriter, tokenizer: ChatTokenizer) -> list[str]:
    """Name the tokens that end an answer, and return a note where GGUF has no place for one.

    It has a place each for the end of a text, of a turn and of a message.
    """
    ends = list(tokenizer.stop_ids)
    eos, turn_end = tokenizer.tokenizer.eos_token_id, _turn_end(tokenizer)
    eos = eos if eos in ends else ends[0]
    writer.add_eos_token_id(eos)
    # The end of a turn is what training supervised; llama.cpp would guess it by name, and may guess another token.
    turn_end = turn_end if turn_end in ends else eos
    writer.add_eot_token_id(turn_end)

    # Some families end a message that calls a tool with a mark of its own; llama.cpp stops at the third place like at
    # the other two.
    names = {token: str(tokenizer.tokenizer.convert_ids_to_tokens(token)) for token in ends}
    others = sorted(
        (token for token in ends if token not in (eos, turn_end)), key=lambda token: "eom" not in names[token]
    )
    if others:
        writer.add_eom_token_id(others[0])
    if not others[1:]:
        return []
    text = ", ".join(names[token] for token in others[1:])
    return [
        f"GGUF names three ends of an answer; llama.cpp stops at {text} only where it knows the name: give it as a "
        "stop text with each request"
    ]


def _chat_notes(tokenizer: ChatTokenizer, document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a chat in llama.cpp needs beside the template in the file to be as in training."""
    chat_format, first_id = tokenizer.chat_format, _first_id(tokenizer)
    first_token = "" if first_id is None else str(tokenizer.tokenizer.convert_ids_to_tokens(first_id))
    if gguf_names.sentencepiece_prefix(document) == "first" and first_token.startswith(gguf_names.SPACE_MARK):
        yield "training put a space before each chat, and llama.cpp puts none: begin the chat template with one"
    if chat_format.system:
        yield "training had a system turn, which the file does not hold: send it with each chat"
    if variables := chat_format.template_kwargs:
        argument = shlex.quote(json.dumps(variables, ensure_ascii=False))
        yield f"the chat template reads variables: start llama-server with --chat-template-kwargs {argument}"
    if date := chat_format.date:
        yield f"the chat template writes the date, which was {date} in training; llama.cpp writes that of the day"


def _turn_end(tokenizer: ChatTokenizer) -> int | None:
    try:
        return tokenizer.answer_ids([{"role": "user", "content": "a"}], "a")[-1]
    except RowRefused:
        return None
