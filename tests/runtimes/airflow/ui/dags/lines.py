"""Stand-ins of two lines, and of the DAG that moves aliases, with the fields of its form."""

from airflow.sdk import DAG, Param

VERSION = "[0-9]{8}T[0-9]{6}Z-[0-9a-f]{12}"

for line in ("intents", "secrets"):
    globals()[line] = DAG(
        line, schedule=None, params={"resume_run": Param(None, type=["null", "string"], pattern=f"^{VERSION}$")}
    )

move = DAG(
    "qlora-retrain-move",
    schedule=None,
    params={
        "line": Param(type="string", pattern="^[a-z][a-z0-9-]{0,61}[a-z0-9]$"),
        "action": Param(type="string", enum=["promote", "rollback"]),
        "from_version": Param(type="string", pattern=f"^({VERSION}|none)$"),
        "reason": Param(type="string", minLength=1, maxLength=500),
        "version": Param(None, type=["null", "string"], pattern=f"^{VERSION}$"),
        "alias": Param(None, type=["null", "string"], pattern="^[a-z][a-z0-9-]{0,31}$"),
    },
)
