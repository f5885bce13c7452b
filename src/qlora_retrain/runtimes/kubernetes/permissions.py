"""What Airflow's accounts and the pods' own may do in the cluster, as `verb resource`.

`manifests/base/rbac.yaml` grants it, `deploy-check` compares the files with it, and `doctor` asks the cluster. A test
compares it with the calls that the operator and its trigger make.
"""

from __future__ import annotations

# The tasks create pods, and whoever may do that can run any image as any account of the namespace.
TASKS = frozenset({"create pods", "get pods", "patch pods", "delete pods", "get pods/log", "list events"})
# The triggerer waits, and deletes the pod of a task that somebody clears.
TRIGGERER = frozenset({"get pods", "delete pods", "get pods/log", "watch events"})
AIRFLOW_NAMESPACE = "airflow"
# With these an account could run other images here, or read the keys of every role.
TOO_MUCH = frozenset({"create pods", "get secrets"})
