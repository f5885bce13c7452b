"""Command: `python -m qlora_retrain.cli`, the same as `qlora-retrain`."""

from qlora_retrain.cli.main import main

main()
