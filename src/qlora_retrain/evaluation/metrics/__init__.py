"""Compute a contestant's metrics: of single completions (`completion_metrics`), of whole suites (`suite_metrics`)."""
