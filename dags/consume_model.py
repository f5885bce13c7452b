"""Build an Airflow DAG `LINE-consume` for every line in `consumers` of platform.yaml: an example of a consumer.

It is scheduled on the line's asset, so it starts by itself when a run publishes a version or a person moves an alias.
It pulls the version that the alias names into a folder of its own, which verifies every byte. Then a fresh process
loads it and answers golden questions. The run fails where too few answers are right, and its note says how many were.

Put the task that makes your server load the folder behind `ask`: then no version is served that did not answer here.

Without Airflow: `qlora-retrain pull LINE@production FOLDER` and `qlora-retrain ask-golden FOLDER QUESTIONS`
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, AssetAlias, Param

from qlora_retrain.config import platform
from qlora_retrain.config.consumers import ConsumerConfig


def consumer_dag(line: str, entry: ConsumerConfig) -> DAG:
    """Make the DAG that follows a line."""
    from qlora_retrain.runtimes.airflow import dag_ids, schedules
    from qlora_retrain.runtimes.airflow.consume import (
        ASK_TASK,
        MIN_RIGHT_FRACTION,
        PULL_TASK,
        QUESTIONS,
        AskOperator,
        PullOperator,
    )

    with DAG(
        dag_ids.consumer_id(line),
        dag_display_name=f"Consume {line}",
        description=f"Pulls {line}@{entry.alias} when it moves, loads it, and asks it golden questions.",
        doc_md=__doc__,
        schedule=[AssetAlias(line)],
        params={
            QUESTIONS: Param(
                None,
                type=["null", "array"],
                items={
                    "type": "object",
                    "properties": {name: {"type": "string", "minLength": 1} for name in ("question", "answer")},
                    "required": ["question", "answer"],
                    "additionalProperties": False,
                },
                minItems=1,
                maxItems=100,
                title="Golden questions",
                description='[{"question": "...", "answer": "..."}]; empty: the file that the platform names',
            ),
            MIN_RIGHT_FRACTION: Param(
                entry.min_right_fraction,
                type="number",
                minimum=0.0,
                maximum=1.0,
                title="Smallest share of right answers",
                description="the run fails (11) below it",
            ),
        },
        # Two pulls into one folder would wait for each other.
        max_active_runs=1,
        dagrun_timeout=timedelta(days=2),
        # The platform's owner has listed the line, so it is wanted.
        is_paused_upon_creation=False,
        catchup=False,
        default_args=schedules.task_defaults(line),
        tags=["qlora-retrain", "consumer"],
    ) as dag:
        pull = PullOperator(task_id=PULL_TASK, task_display_name="Pull and verify", line=line, entry=entry)
        ask = AskOperator(task_id=ASK_TASK, task_display_name="Ask golden questions", line=line, entry=entry)
        pull >> ask
    return dag


for line, entry in platform.load().consumers.items():
    dag = consumer_dag(line, entry)
    globals()[f"dag {dag.dag_id}"] = dag
