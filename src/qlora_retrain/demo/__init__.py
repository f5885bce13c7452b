"""Airflow on loopback for `make run`, `make ui` and tests. No production code imports this package."""
