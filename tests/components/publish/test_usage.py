"""The programs of a model card run as they are written, in the folder of a version, and stop where training ended."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from components.publish import contents
from components.publish.base_model import BaseId
from components.publish.facts import VersionFacts
from components.publish.usage import usage_lines
from qlora_retrain.config.sections import PublishConfig
from qlora_retrain.lm import chat, loading
from qlora_retrain.lm.chat_format import ChatFormat
from qlora_retrain.pipeline.plan import Plan

QUESTION = "my money back of order number 1500"


def programs(plan: Plan, **fields: Any) -> list[str]:
    """The programs of a card."""
    facts = VersionFacts(PublishConfig(), plan, "v", {}, {}, **{"certificate": {}, **fields})
    text = "\n".join(usage_lines(facts))
    return re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)


def with_identity(plan: Plan, name: str, **fields: Any) -> Plan:
    """The plan with other settings of a step."""
    steps = [
        step.model_copy(update={"identity": {**step.identity, **fields}}) if step.name == name else step
        for step in plan.steps
    ]
    return plan.model_copy(update={"steps": tuple(steps)})


@pytest.fixture
def version(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A version that is an adapter alone, with its base beside it; the working directory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    (tmp_path / "base_model").symlink_to(tiny_model)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path / "adapter")
    config_path = tmp_path / "adapter/adapter_config.json"
    config_path.write_text(contents.adapter_config(json.loads(config_path.read_text()), None))
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    ChatFormat(system="Name the intent.").write(tmp_path / "model")
    return tmp_path


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by a name that it deprecates
def test_the_program_of_an_adapter_alone_answers_and_stops_at_the_ends_of_the_version(
    version: Path, made_plan: Plan, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    (program,) = programs(made_plan, is_alone=True, certificate={"base": "original"})
    # A second way: this project's own loaders, one token after another.
    model = loading.attach_adapter(loading.load_base(tiny_model), version / "adapter")
    tokenizer = chat.load_tokenizer(tiny_model)
    turns = [{"role": "system", "content": "Name the intent."}, {"role": "user", "content": "Your question"}]
    prompt = list(tokenizer.prompt_ids(turns))
    ids = prompt.copy()
    while len(ids) < len(prompt) + 4:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    answer = ids[len(prompt) :]
    assert len(set(answer)) == 4
    assert not {0, 1, 2} & set(answer)

    # The ends of the version are not the base's: here the answer's third token is one.
    ends = {"eos_token_id": [2, answer[2]], "pad_token_id": 0}
    (version / "model/generation_config.json").write_text(json.dumps(ends))
    exec(compile(program, "card", "exec"), {})
    assert capsys.readouterr().out == tokenizer.tokenizer.decode(answer[:3]) + "\n"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_finds_the_base_that_an_adapter_names_beside_the_program(version: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    assert AutoPeftModelForCausalLM.from_pretrained("adapter").config.hidden_size == 64
    # Without that folder nothing is looked for on the Hub.
    (version / "base_model").unlink()
    with pytest.raises(OSError, match=r"Repo id must .*'\./base_model'"):
        AutoPeftModelForCausalLM.from_pretrained("adapter")


def test_an_adapter_that_was_certified_over_packed_weights_is_loaded_over_such_where_transformers_packs_them(
    made_plan: Plan,
) -> None:
    (program,) = programs(made_plan, is_alone=True, certificate={"base": "dequantized"})
    assert 'from_pretrained("./base_model", quantization_config=quantization)' in program
    packed = with_identity(made_plan, "quantize_model", format="int4")
    (program,) = programs(packed, is_alone=True, certificate={"base": "dequantized"})
    assert "quantization" not in program


def test_a_merged_model_has_a_program_of_its_own_and_one_for_its_adapter(made_plan: Plan) -> None:
    merged, adapter = programs(made_plan, base_id=BaseId("acme/base", "1" * 40))
    assert 'AutoModelForCausalLM.from_pretrained("model")' in merged
    assert f'AutoModelForCausalLM.from_pretrained("acme/base", revision="{"1" * 40}")' in adapter
    assert "./base_model" not in adapter

    # Over any other base than its own, an adapter that corrects it is another model.
    correcting = with_identity(made_plan, "train_qlora", method="loftq")
    (alone,) = programs(correcting)
    assert alone == merged
    facts = VersionFacts(PublishConfig(), correcting, "v", {}, {}, {})
    assert "over any other base it is another model" in "\n".join(usage_lines(facts))
