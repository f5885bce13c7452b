"""The places where steps run: subprocesses without an orchestrator (`local`), Airflow, Kubernetes, Docker, Kubeflow.

Only this package and `demo` may import an orchestrator.
"""
