"""The methods of `train.method`, one small file each.

A method says how the trained parameters learn. One with an adapter also says what it is as plain LoRA: matrices A and
B of each layer with delta W = B A. Adapters always ship in this form, since servers ignore scales of single methods.
"""

from __future__ import annotations

from components.train_qlora.methods.adalora import AdaLora
from components.train_qlora.methods.bottleneck import Bottleneck
from components.train_qlora.methods.dora import Dora
from components.train_qlora.methods.dylora import DyLora
from components.train_qlora.methods.full import Full as Full
from components.train_qlora.methods.ia3 import Ia3
from components.train_qlora.methods.ir_qlora import IrQLora
from components.train_qlora.methods.lora import Lora as Lora
from components.train_qlora.methods.lora_plus import LoraPlus
from components.train_qlora.methods.method import Method as Method
from components.train_qlora.methods.prefix import Prefix
from components.train_qlora.methods.prompt import Prompt
from components.train_qlora.methods.qa_lora import QaLora
from components.train_qlora.methods.starts import LoftQ, LoraXs
from components.train_qlora.methods.without_matrices import WithoutMatrices as WithoutMatrices
from qlora_retrain.config.sections import TrainConfig

# rsLoRA is LoRA with another scale, which `lm.adapter_scale` gives.
METHODS: dict[str, type[Method]] = {
    "lora": Lora,
    "rslora": Lora,
    "lora+": LoraPlus,
    "dora": Dora,
    "adalora": AdaLora,
    "dylora": DyLora,
    "qdylora": DyLora,  # over a 4-bit base
    "qa-lora": QaLora,
    "lora-xs": LoraXs,
    "loftq": LoftQ,
    "ia3": Ia3,
    "prompt": Prompt,
    "prefix": Prefix,
    "bottleneck": Bottleneck,
    "lq-lora": LoftQ,  # from another start
    "ir-qlora": IrQLora,
    "full": Full,
}


def method_of(config: TrainConfig) -> Method:
    """Return the method that the settings name."""
    return METHODS[config.method](config)
