"""The plugin that writes how a run ended into its note, for the demo's Airflow, whose plugins lie in this folder."""

from qlora_retrain.runtimes.airflow.run_notes import RunNotes as RunNotes
