"""Run llama.cpp's own server over one GGUF file, as programs that serve such files do.

`make gguf-setup` installs a prebuilt wheel with llama.cpp inside. It is used only for this comparison.
"""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class LlamaServer:
    """A server in this process, to which requests go over HTTP on loopback."""

    def __init__(self, path: Path, *, context_tokens: int, threads: int = 1, adapter: Path | None = None) -> None:
        """Load a GGUF file, with a GGUF adapter over it."""
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_ctx = context_tokens
        options.n_parallel = 1  # one slot, so that a request has the whole context
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        options.port = 0  # any free port
        options.warmup = False
        if adapter:
            options.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(options)
        # A server that is closed before its loop has begun never ends: the request to end is lost. An answer comes from
        # the loop.
        self._post("/completion", {"prompt": [0], "n_predict": 0, "cache_prompt": False})

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text that may hold special tokens."""
        answer = self._post("/tokenize", {"content": text, "add_special": False, "parse_special": True})
        return [int(token) for token in answer["tokens"]]

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of a chat with what begins the answer, as the server reads it."""
        text = self._post("/apply-template", {"messages": list(messages)})["prompt"]
        answer = self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return [int(token) for token in answer["tokens"]]

    def log_probabilities(self, ids: Sequence[int], *, vocabulary: int, any_token: int) -> list[float]:
        """Return the log probability of every token of the vocabulary after `ids`.

        The server returns them with a token that it generates, which a bias forces to be `any_token`. That must be
        whole text, since the server holds back half a character. The probabilities are those without the bias.
        """
        request = {"prompt": list(ids), "n_predict": 1, "n_probs": vocabulary, "logit_bias": [[any_token, 1e3]]}
        (generated,) = self._post("/completion", request)["completion_probabilities"]
        logprobs = [math.nan] * vocabulary
        for entry in generated["top_logprobs"]:
            logprobs[entry["id"]] = entry["logprob"]
        return logprobs

    def answer(self, messages: Sequence[Mapping[str, str]], *, max_tokens: int) -> str:
        """Return the greedy answer to a chat, rendered by the template in the file."""
        request = {"messages": list(messages), "temperature": 0.0, "max_tokens": max_tokens}
        return str(self._post("/v1/chat/completions", request)["choices"][0]["message"]["content"])

    def _post(self, path: str, document: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(document).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)
