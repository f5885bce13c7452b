"""The command line: `qlora-retrain` and, with kfp installed, `qlora-retrain kfp`."""
