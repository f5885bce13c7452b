"""The doctor's manifests: valid, read-only but for dry runs, and with the same settings as Airflow's."""

from __future__ import annotations

import subprocess
from typing import Any

import cel
import kubernetes_validate
import pytest
import yaml

from qlora_retrain.runtimes.kubernetes import permissions, pod_security
from tests.manifests.overlays import KUBECTL, ROOT, granted_permissions, load_profile

ACCOUNT = "system:serviceaccount:airflow:qlora-retrain-doctor"
Document = dict[str, Any]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    completed = subprocess.run([KUBECTL, "kustomize", ROOT / "doctor"], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(completed.stdout))


@pytest.fixture(scope="module")
def job() -> Document:
    document = yaml.safe_load((ROOT / "doctor" / "job.yaml").read_text())
    assert isinstance(document, dict)
    return document


def test_every_document_is_valid(documents: list[Document], job: Document) -> None:
    for document in (*documents, job):
        kubernetes_validate.validate(document, "1.32", strict=True)


def test_the_account_reads_no_secret_and_changes_nothing(documents: list[Document]) -> None:
    rules = [rule for document in documents for rule in document.get("rules", ())]
    verbs = {(verb, resource) for rule in rules for verb in rule["verbs"] for resource in rule["resources"]}
    assert {(verb, resource) for verb, resource in verbs if verb not in ("get", "list")} == {
        ("create", "pods"),
        ("create", "localsubjectaccessreviews"),
    }
    assert not {"*", "secrets", "pods/exec"} & {resource for _, resource in verbs}
    namespaces = {d["metadata"]["namespace"] for d in documents if d["kind"] in ("Role", "RoleBinding")}
    assert namespaces == {load_profile("production").namespace}
    for binding in (d for d in documents if d["kind"].endswith("Binding") and "subjects" in d):
        assert [f"system:serviceaccount:{s['namespace']}:{s['name']}" for s in binding["subjects"]] == [ACCOUNT]


def test_the_api_server_refuses_every_pod_of_the_doctor_that_is_no_dry_run(documents: list[Document]) -> None:
    (policy,) = [d for d in documents if d["kind"] == "ValidatingAdmissionPolicy"]
    (binding,) = [d for d in documents if d["kind"] == "ValidatingAdmissionPolicyBinding"]
    assert policy["spec"]["failurePolicy"] == "Fail"
    assert binding["spec"] == {"policyName": policy["metadata"]["name"], "validationActions": ["Deny"]}
    (rule,) = policy["spec"]["matchConstraints"]["resourceRules"]
    assert (rule["resources"], rule["operations"]) == (["pods"], ["CREATE"])

    def is_admitted(username: str, **request: object) -> bool:
        context = {"request": {"userInfo": {"username": username}, **request}}
        (condition,), (validation,) = policy["spec"]["matchConditions"], policy["spec"]["validations"]
        if cel.evaluate(condition["expression"], context) is not True:
            return True
        return cel.evaluate(validation["expression"], context) is True

    assert is_admitted(ACCOUNT, dryRun=True)
    assert not is_admitted(ACCOUNT, dryRun=False)
    assert not is_admitted(ACCOUNT)
    assert is_admitted("system:serviceaccount:airflow:airflow-scheduler", dryRun=False)


def test_the_job_is_confined_and_has_airflows_settings(job: Document) -> None:
    pod = {"metadata": job["spec"]["template"]["metadata"], "spec": job["spec"]["template"]["spec"]}
    assert pod_security.restricted(pod) == []
    assert pod["spec"]["serviceAccountName"] == "qlora-retrain-doctor"
    values = yaml.safe_load((ROOT / "airflow" / "values.yaml").read_text())
    (checkout,), (doctor,) = pod["spec"]["initContainers"], pod["spec"]["containers"]
    sync = values["dags"]["gitSync"]
    assert {f"--repo={sync['repo']}", f"--ref={sync['ref']}"} <= set(checkout["args"])
    assert doctor["image"] == f"apache/airflow:{values['defaultAirflowTag']}"
    own = {variable["name"]: variable["value"] for variable in doctor["env"]}
    airflow = {
        variable["name"]: variable["value"].replace("/opt/airflow/dags/repo", "/git/repo") for variable in values["env"]
    }
    assert airflow.items() <= own.items()


def test_what_the_checks_expect_of_airflows_accounts_is_what_the_manifests_grant() -> None:
    granted = {
        account: {f"{verb} {resource}" for verb, resource, _ in items}
        for (_, account), items in granted_permissions("production").items()
    }
    assert granted == {"airflow-scheduler": permissions.TASKS, "airflow-triggerer": permissions.TRIGGERER}
