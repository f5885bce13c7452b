"""Retrain a language model with QLoRA, decide by measurement whether it may ship, and publish what others can trust."""

__version__ = "0.1.0"
