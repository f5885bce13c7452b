"""Reports and published models in Airflow's own UI: a plugin with pages that read the store and write nothing to it."""
