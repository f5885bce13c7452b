"""The rules of a verdict, one idea a module; `qlora_retrain.verdict` applies them. `docs/verdict.md` explains them."""
