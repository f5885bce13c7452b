"""How a model is measured and judged: scores, statistics, rules, the verdict.

Hashed: a step's code identity covers what it imports of this package.
"""
