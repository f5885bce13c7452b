"""The command line: `qlora-retrain`, one module for each group of verbs."""
