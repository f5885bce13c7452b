"""Evaluate a model: scores per row, metrics with intervals, rules, and the verdict.

This package is hashed: a step's code identity covers the modules that the step imports from it.
"""
