"""Check the rules of a verdict. `evaluation.verdict` applies them, `docs/verdict.md` explains them."""
