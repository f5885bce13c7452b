"""The pipeline as a Kubeflow pipeline: its tasks, runs on a cluster, and runs on the local engine."""
