"""What runs the steps: without an orchestrator (`local`), in Airflow, on Kubernetes, in Docker, on Kubeflow.

Only this package and `demo` may import an orchestrator.
"""
