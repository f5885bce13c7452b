"""Full fine-tuning: every weight of a 16-bit base learns, and there is no adapter.

`all_weights` prepares, saves and loads the model. The optimizer keeps fp32 copies of the weights, as it does of every
16-bit parameter.
"""

from __future__ import annotations

from components.train_qlora.methods.method import Method


class Full(Method):
    """All weights, by AdamW alone."""
