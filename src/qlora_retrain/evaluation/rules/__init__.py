"""The rules of a verdict, one idea a module. `evaluation.verdict` applies them, `docs/verdict.md` explains them."""
