"""The pipeline as an Airflow DAG: one operator for each runtime."""
