"""Say on the model card how a version is used, by programs that run as they are written in the version's folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from components.publish import markdown
from components.publish.base_model import FOLDER
from components.publish.facts import VersionFacts

# Methods whose adapters PEFT cannot load (`config/methods.py`).
WITHOUT_PEFT = ("bottleneck", "full")
# Their adapters also correct the packed base of their run, so they are another model over any other base.
OVER_OWN_BASE = ("loftq", "lq-lora")
# Packed forms (`quantize.format`) that transformers makes while it loads a base.
_PACKED_BY_TRANSFORMERS = ("nf4", "fp4")

_READ = 'json.loads(Path("model/{}").read_text(encoding="utf-8"))'
_CHAT = f"""\
tokenizer = AutoTokenizer.from_pretrained("model")
chat_format = {_READ.format("chat_format.json")}
# The system turn of its training, if it had one; without it the answers are worse.
chat = [{{"role": "system", "content": chat_format["system"]}}] if chat_format["system"] else []
chat.append({{"role": "user", "content": "Your question"}})
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True, **chat_format["template_kwargs"]
).to(model.device)"""
_PRINT = 'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'


def usage_lines(facts: VersionFacts) -> list[str]:
    """Return the section: how the model is loaded and asked, and what it was trained with."""
    lines = _alone_lines(facts) if facts.is_alone else [*_model_lines(), *_adapter_lines(facts)]
    return [*lines, *_training_lines(facts)]


def _model_lines() -> Iterator[str]:
    yield (
        "`model/` is a plain transformers folder, and its `generation_config.json` lists every token at which an "
        "answer ends. Of a copy on the Hugging Face Hub load the subfolder: `from_pretrained(NAME, "
        'subfolder="model")`. In the version\'s folder:'
    )
    yield ""
    load = ('model = AutoModelForCausalLM.from_pretrained("model")',)
    yield from _program("AutoModelForCausalLM, AutoTokenizer", load, "max_new_tokens=200")


def _adapter_lines(facts: VersionFacts) -> Iterator[str]:
    """Say how the adapter beside a merged model is loaded."""
    method = facts.train["method"]
    if "adapter" not in facts.config.parts or method in WITHOUT_PEFT:
        return
    if method in OVER_OWN_BASE:
        yield (
            "`adapter/` belongs to the packed base of its run, which it also corrects: over any other base it is "
            "another model. Serve `model/`."
        )
        yield ""
        return
    yield (
        "`adapter/` is the adapter by itself. The table above says how good it is over its base without merging, and "
        f"the limits below which servers cannot load it. {_base_sentence(facts)} With PEFT, over the base in 16 bits:"
    )
    yield ""
    yield from _peft_program(facts, is_packed=False)


def _alone_lines(facts: VersionFacts) -> Iterator[str]:
    """Say how an adapter is loaded over its base, by this project and by PEFT."""
    where = f": `{facts.base_id.repository}`" if facts.base_id else ""
    yield (
        f"This version is an adapter alone: it has no merged model, and is used over its base model{where}. "
        "`model/base.json` has the hashes of the base's files, and `model/` the tokenizer. `qlora-retrain ask VERSION "
        "--base FOLDER QUESTION` checks the hashes and answers."
    )
    yield ""
    if facts.train["method"] in WITHOUT_PEFT:
        return
    is_certified_packed = facts.certificate.get("base") == "dequantized"
    is_packed = is_certified_packed and _base_format(facts) in _PACKED_BY_TRANSFORMERS
    over = "the packed base, over which it was certified" if is_packed else "the base in 16 bits"
    if is_certified_packed and not is_packed:
        over += ", and not over the packed base, over which it was certified: the table above has the difference"
    yield f"With PEFT, in the version's folder, over {over}. {_base_sentence(facts)}"
    yield ""
    yield from _peft_program(facts, is_packed=is_packed)


def _base_sentence(facts: VersionFacts) -> str:
    """Say where PEFT finds the base that `adapter_config.json` names."""
    if facts.base_id:
        return f"`adapter_config.json` names the base, `{facts.base_id.repository}`."
    return (
        f"Its base has no public name, so `adapter_config.json` names the folder `{FOLDER}`: put the base there, or a "
        "link to it. `manifest.json` lists its files, as `base`."
    )


def _peft_program(facts: VersionFacts, *, is_packed: bool) -> Iterator[str]:
    commit = facts.base_id and facts.base_id.commit
    arguments = [json.dumps(facts.base_id.repository if facts.base_id else FOLDER)]
    arguments += [f"revision={json.dumps(commit)}"] if commit else []
    load = []
    if is_packed:
        load.append(f'quantization = {_READ.format("base.json")}["quantization"]')
        arguments.append("quantization_config=quantization")
    load += [
        f"base = AutoModelForCausalLM.from_pretrained({', '.join(arguments)})",
        'model = PeftModel.from_pretrained(base, "adapter")',
        "# Where the base stops is not always where the answers of the training end.",
        'settings = GenerationConfig.from_pretrained("model", max_new_tokens=200)',
    ]
    names = "AutoModelForCausalLM, AutoTokenizer, GenerationConfig"
    yield from _program(names, load, "generation_config=settings", has_peft=True)


def _program(names: str, load: Iterable[str], generation: str, *, has_peft: bool = False) -> Iterator[str]:
    """Yield a program that loads a model, asks it a question and prints the answer."""
    lines = [
        "import json",
        "from pathlib import Path",
        "",
        *(["from peft import PeftModel"] if has_peft else []),
        f"from transformers import {names}",
        "",
        *load,
        _CHAT,
        f"answer = model.generate(**inputs, {generation})",
        _PRINT,
    ]
    yield from (markdown.code_block("\n".join(lines), "python"), "")


def _training_lines(facts: VersionFacts) -> Iterator[str]:
    """Show the system turn and the template's variables and date, without which answers are worse."""
    data = facts.plan.step("validate_data").identity
    if data["system"]:
        yield from ("It was trained with this system turn:", "", markdown.code_block(data["system"]), "")
    if variables := data.get("template_kwargs"):
        yield "It was trained with these variables of the chat template, as arguments of `apply_chat_template`:"
        yield from ("", markdown.code_block(json.dumps(variables, ensure_ascii=False)), "")
    if date := data.get("template_date"):
        yield f"Its chat template writes the date of the day, and it was trained with {markdown.inline(str(date))}."
        yield ""


def _base_format(facts: VersionFacts) -> str:
    return str(facts.plan.step("quantize_model").identity.get("format", "nf4"))
