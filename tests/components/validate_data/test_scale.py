"""The data gate takes time and memory in proportion to its rows, and little memory for what they say."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.validate_data import BASE, measure
from tests.conftest import needs_base  # noqa: F401
