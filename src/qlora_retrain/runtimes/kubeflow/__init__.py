"""The pipeline on Kubeflow Pipelines: its components, its API, its local runner."""
