"""Run the language model: tokenize chats, load models, score, rank labels, generate answers, verify checkpoints.

This package is hashed: a step's code identity covers the modules that the step imports from it.
"""
