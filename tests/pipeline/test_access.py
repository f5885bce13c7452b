"""What each role may do with each part of a store: a table written by hand, asked of the policies and of a server.

moto's IAM enforces action and resource. It knows no condition (a statement with one denies), and of `DeleteObjects` it
asks whether the bucket may be deleted from; so the server gets the policies without conditions, and with the bucket as
a further resource of deletes. Conditions are evaluated by `tests/policies.py` alone, for every request of a whole run.
"""

from __future__ import annotations

import functools
import json
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import unescape

import boto3
import pytest
from botocore.exceptions import ClientError

from qlora_retrain.cli import main
from qlora_retrain.config.line import LineConfig, load
from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import access, collect, execute, make_plan, policies, run_endings, status
from qlora_retrain.storage import artifact, collection_mark, open_store, pull
from qlora_retrain.storage.s3 import S3Store
from tests.conftest import ticket_rows, write_jsonl
from tests.policies import Document, is_allowed, is_denied

ROOT = "s3://iam-bucket/qlora"
LINE = """
line: tickets
sources:
  raw_data: s3://data/tickets
  base_model: s3://data/base
  golden_data: s3://data/golden
  reference_data: s3://data/general
"""
ROLES = {
    "P": "planner",
    "v": "validate_data",
    "q": "quantize_model",
    "t": "train_qlora",
    "e": "evaluate",
    "m": "merge_adapter",
    "p": "publish-tickets",
    "g": "gc",
    "c": "pull",
    "x": "mirror",
    "s": "message",
}
KEY, RUN = "0" * 64, "20260131T030000Z-0123456789ab"
STAMPED = "20260131T030000Z-fedcba987654"
VERSION = f"qlora/models/tickets/versions/{STAMPED}"
# Of each file: the roles that may read it, write it, delete it.
TABLE: dict[str, tuple[str, str, str]] = {
    f"qlora/runs/{RUN}/plan.json": ("Pvqtempgs", "P", "g"),
    f"qlora/runs/{RUN}/endings/plan.json": (
        "Pvqtempgs",
        "P",
        "Pg",
    ),  # `*` in a pattern matches slashes: harmless to read
    f"qlora/runs/{RUN}/endings/train_qlora.json": ("Ps", "Pt", "Ptg"),
    f"qlora/runs/{RUN}/endings/publish.json": ("Ps", "Pp", "Ppg"),
    f"qlora/runs/{RUN}/status/evaluate.json": ("P", "e", "g"),
    f"qlora/runs/{RUN}/logs/validate_data-01234567.log": ("", "v", "g"),
    f"qlora/runs/{RUN}/logs/validate_data-0/plan.json": ("Pvqtempgs", "P", "g"),
    f"qlora/runs/{RUN}/report.html": ("", "", "g"),
    f"qlora/artifacts/dataset/{KEY}/_manifest.json": ("Pvtempgs", "v", "g"),
    f"qlora/artifacts/dataset/{KEY}/a/train.jsonl": ("vtemp", "v", "vg"),
    f"qlora/artifacts/dataset/{KEY}/a/evaluated_prompts.txt": ("Pvtemp", "v", "vg"),
    f"qlora/artifacts/base_nf4/{KEY}/_manifest.json": ("Pqtemgs", "q", "g"),
    f"qlora/artifacts/base_nf4/{KEY}/a/model.safetensors": ("qtem", "q", "qg"),
    f"qlora/artifacts/adapter/{KEY}/_manifest.json": ("Ptempgs", "t", "g"),
    f"qlora/artifacts/adapter/{KEY}/a/report.html": ("Ptemp", "t", "tg"),
    f"qlora/artifacts/evaluation/{KEY}/_manifest.json": ("Pempgs", "e", "g"),
    f"qlora/artifacts/evaluation/{KEY}/a/evaluation.json": ("emp", "e", "eg"),
    f"qlora/artifacts/model/{KEY}/_manifest.json": ("Pmpgs", "m", "g"),
    f"qlora/artifacts/model/{KEY}/a/model.safetensors": ("mp", "m", "mg"),
    f"qlora/artifacts/release/{KEY}/_manifest.json": ("Ppgs", "p", "g"),
    f"qlora/artifacts/release/{KEY}/a/release.json": ("p", "p", "pg"),
    f"qlora/artifacts/other/{KEY}/_manifest.json": ("Pgs", "", "g"),
    f"qlora/scratch/train_qlora/{KEY}/a/checkpoint-1/state.pt": ("t", "t", "tg"),
    f"qlora/scratch/evaluate/{KEY}/a/checkpoint-1/state.pt": ("", "", "g"),
    f"{VERSION}/manifest.json": ("Pvepgcx", "p", "g"),
    f"{VERSION}/model/model.safetensors": ("epcx", "p", "g"),
    f"{VERSION}/data/profile.json": ("vepcx", "p", "g"),
    f"{VERSION}/recipe.json": ("Ppcx", "p", "g"),
    f"{VERSION}/adapter/adapter_model.safetensors": ("epcx", "p", "g"),
    "qlora/models/tickets/aliases/production.json": ("Ppgcxs", "p", ""),
    "qlora/models/tickets/audit/00000001-production-0123.json": ("Ppgcx", "p", ""),
    f"qlora/models/tickets/moving/{STAMPED}.json": ("pcx", "p", "pg"),
    # The collector sees what every line names, since artifacts are shared; it removes versions of this line alone.
    f"qlora/models/others/versions/{STAMPED}/manifest.json": ("g", "", ""),
    f"qlora/models/others/versions/{STAMPED}/model/model.safetensors": ("", "", ""),
    "qlora/models/others/aliases/production.json": ("g", "", ""),
    "qlora/models/ticketsx/aliases/production.json": ("g", "", ""),
    f"qlora/histories/tickets/{KEY}.txt": ("Pv", "P", ""),
    f"qlora/histories/tickets/datasets/20260131T030000Z-{KEY}.json": ("Pg", "P", ""),
    f"qlora/histories/others/{KEY}.txt": ("", "", ""),
    f"qlora/histories/ticketsx/datasets/20260131T030000Z-{KEY}.json": ("g", "", ""),
    "qlora/gc/mark.json": ("Ppg", "g", ""),
    f"qlora/runs/{RUN}/renewed/20260131T030000Z.json": ("", "P", "g"),
    "qlora/.probe/0123": ("Pp", "Pp", "Pp"),
    "other/runs/x/plan.json": ("", "", ""),
}
SOURCES = {
    "tickets/tickets.jsonl": "Pv",
    "base/tokenizer.json": "Pvqem",
    "base/model.safetensors": "Pqem",  # validate_data reads the tokenizer alone
    "golden/rows.jsonl": "Pve",
    "general/text.jsonl": "Pem",
    "others/rows.jsonl": "",
}
ACTIONS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject")


@pytest.fixture(scope="module")
def config() -> LineConfig:
    return load(LINE)


@pytest.fixture(scope="module")
def documents(config: LineConfig) -> dict[str, Document]:
    return {role: policies.role_policy(config, role, ROOT) for role in access.roles(config.line)}


def letters(roles: set[str]) -> str:
    return "".join(letter for letter, role in ROLES.items() if role in roles)


def test_each_role_does_with_each_file_what_the_table_says(documents: dict[str, Document]) -> None:
    assert set(documents) == set(ROLES.values())
    for path, expected in TABLE.items():
        arn = f"arn:aws:s3:::iam-bucket/{path}"
        for action, roles in zip(ACTIONS, expected, strict=True):
            allowed = {role for role, document in documents.items() if is_allowed(document, action, arn)}
            assert letters(allowed) == roles, (path, action)


def test_a_source_is_read_by_the_steps_that_read_it_and_written_by_nobody(documents: dict[str, Document]) -> None:
    for path, expected in SOURCES.items():
        arn = f"arn:aws:s3:::data/{path}"
        readers = {role for role, document in documents.items() if is_allowed(document, "s3:GetObject", arn)}
        assert letters(readers) == expected, path
        for action in ("s3:PutObject", "s3:DeleteObject"):
            assert not any(is_allowed(document, action, arn) for document in documents.values())
        # By the version of an object the plan remembers its hash.
        versions = {role for role, doc in documents.items() if is_allowed(doc, "s3:GetObjectVersion", arn)}
        assert versions <= {"planner"}


def test_a_lines_uri_is_no_pattern_in_a_policy() -> None:
    line = LINE.replace("s3://data/tickets", "s3://*/*").replace("s3://data/base", "s3://data/${aws:username}/b")
    for role in ("planner", "validate_data", "train_qlora"):
        document = policies.role_policy(load(line), role, ROOT)
        for path in ("payroll/all/rows.jsonl", "data/alice/b/model.safetensors", "data/x"):
            for action in ("s3:GetObject", "s3:GetObjectVersion"):
                assert not is_allowed(document, action, f"arn:aws:s3:::{path}"), (role, path)
        assert not is_allowed(document, "s3:ListBucket", "arn:aws:s3:::payroll", {"s3:prefix": "all/"})
    planner = policies.role_policy(load(line), "planner", ROOT)
    for path in ("*/*/rows.jsonl", "data/${aws:username}/b/model.safetensors"):
        assert is_allowed(planner, "s3:GetObject", f"arn:aws:s3:::{path}")


def test_the_planner_reads_the_history_of_a_lines_former_name_and_writes_the_lines_own(config: LineConfig) -> None:
    document = policies.role_policy(load(LINE, ["data.history_of=requests"]), "planner", ROOT)
    for path, actions in [
        (f"histories/requests/{KEY}.txt", ["s3:GetObject"]),
        (f"histories/requests/datasets/{KEY}.json", ["s3:GetObject"]),
        (f"histories/tickets/{KEY}.txt", ["s3:GetObject", "s3:PutObject"]),
        (f"histories/others/{KEY}.txt", []),
    ]:
        assert [a for a in ACTIONS if is_allowed(document, a, f"arn:aws:s3:::iam-bucket/qlora/{path}")] == actions


def test_a_step_reads_the_adapters_of_versions_where_the_line_uses_them_alone() -> None:
    adapter = f"arn:aws:s3:::iam-bucket/qlora/models/tickets/versions/{STAMPED}/adapter/adapter_model.safetensors"
    replay = "arn:aws:s3:::data/replay/rows.jsonl"
    general = "arn:aws:s3:::data/general/rows.jsonl"
    for role, override, paths in [
        ("train_qlora", "train.start=champion", [adapter]),
        ("merge_adapter", "merge.soup=2", [adapter]),
        ("validate_data", "sources.replay_data=s3://data/replay", [replay, general]),
    ]:
        for overrides, expected in (([], False), ([override], True)):
            document = policies.role_policy(load(LINE, overrides), role, ROOT)
            assert [is_allowed(document, "s3:GetObject", path) for path in paths] == [expected] * len(paths)
            assert not is_allowed(document, "s3:PutObject", adapter)


def test_no_role_has_an_action_that_nothing_needs_and_none_is_a_pattern(documents: dict[str, Document]) -> None:
    actions = {action for doc in documents.values() for statement in doc["Statement"] for action in statement["Action"]}
    assert actions == {
        "s3:ListBucket",
        "s3:GetObject",
        "s3:GetObjectVersion",
        "s3:PutObject",
        "s3:AbortMultipartUpload",
        "s3:ListBucketMultipartUploads",
        "s3:DeleteObject",
        "s3:PutObjectRetention",
        "s3:GetObjectRetention",
    }
    for document in documents.values():
        assert {statement["Effect"] for statement in document["Statement"]} == {"Allow"}
        assert not any({"NotAction", "NotResource"} & set(statement) for statement in document["Statement"])
        assert len(json.dumps(document, separators=(",", ":"))) < 10_240 / 2, (
            "inline policies of a role, two lines at least"
        )


def test_a_role_lists_what_it_may_read_and_no_more(documents: dict[str, Document]) -> None:
    prefixes = {
        "qlora/runs/": "Pg",
        f"qlora/artifacts/dataset/{KEY}/a/": "Pvtempg",
        f"qlora/scratch/train_qlora/{KEY}/": "tg",
        "qlora/models/tickets/versions/": "pgcx",
        "qlora/models/": "g",
        "qlora/models/others/versions/": "g",
        "qlora/histories/": "Pg",
        "qlora/histories/tickets/datasets/": "Pg",
        "qlora/gc/mark.json": "Ppg",
        "": "",
    }
    for prefix, expected in prefixes.items():
        context = {"s3:prefix": prefix}
        lists = {r for r, d in documents.items() if is_allowed(d, "s3:ListBucket", "arn:aws:s3:::iam-bucket", context)}
        assert letters(lists) == expected, prefix
    assert not any(is_allowed(d, "s3:ListBucket", "arn:aws:s3:::iam-bucket") for d in documents.values())


def test_retention_is_set_by_publish_alone_and_only_where_the_line_wants_it(documents: dict[str, Document]) -> None:
    def roles(rendered: dict[str, Document], path: str) -> str:
        arn = f"arn:aws:s3:::iam-bucket/{path}"
        return letters({role for role, doc in rendered.items() if is_allowed(doc, "s3:PutObjectRetention", arn)})

    assert roles(documents, f"{VERSION}/manifest.json") == "p"
    assert roles(documents, "qlora/models/tickets/audit/00000001-production-0123.json") == "p"
    assert roles(documents, "qlora/models/tickets/aliases/production.json") == ""
    without = load(LINE, ["publish.retention_days=0"])
    assert roles({"publish-tickets": policies.role_policy(without, "publish-tickets", ROOT)}, VERSION + "/x") == ""


def test_a_step_that_the_graph_gets_has_its_policy_by_itself(
    config: LineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = graph.Step(
        "distill",
        title="Distill",
        section="train",
        reads=(graph.Input("adapter"),),
        makes="student",
        image="train",
        summary="",
        scratch=True,
    )
    monkeypatch.setattr(graph, "STEPS", (*graph.STEPS, extra))
    assert "distill" in access.roles("tickets")
    document = policies.role_policy(config, "distill", ROOT)
    for action, path, expected in [
        ("s3:GetObject", f"artifacts/adapter/{KEY}/_manifest.json", True),
        ("s3:GetObject", f"artifacts/dataset/{KEY}/_manifest.json", False),
        ("s3:PutObject", f"artifacts/student/{KEY}/_manifest.json", True),
        ("s3:PutObject", f"artifacts/adapter/{KEY}/_manifest.json", False),
        ("s3:DeleteObject", f"scratch/distill/{KEY}/a/x", True),
    ]:
        assert is_allowed(document, action, f"arn:aws:s3:::iam-bucket/qlora/{path}") is expected


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        (f"artifacts/dataset/{KEY}/_manifest.json", {}, True),
        (f"artifacts/dataset/{KEY}/_manifest.json", {"s3:if-match": "e"}, True),
        (f"artifacts/dataset/{KEY}/_manifest.json", {"s3:if-none-match": "*"}, False),
        (f"models/tickets/versions/{STAMPED}/manifest.json", {}, True),
        ("models/tickets/audit/00000001-production-0123.json", {}, True),
        (f"runs/{RUN}/plan.json", {}, True),
        (f"runs/{RUN}/plan.json", {"s3:if-none-match": "*"}, False),
        (f"histories/tickets/{KEY}.txt", {}, True),
        (f"histories/tickets/datasets/{RUN}.json", {"s3:if-none-match": "*"}, False),
        (f"runs/{RUN}/endings/plan.json", {}, False),  # of the planner: replaced at each try
        (f"artifacts/dataset/{KEY}/a/train.jsonl", {}, False),
        (f"models/tickets/versions/{STAMPED}/model/model.safetensors", {}, False),  # S3 copies without a condition
        ("models/tickets/aliases/production.json", {}, True),
        ("models/tickets/aliases/production.json", {"s3:if-match": "e"}, False),
        ("models/tickets/aliases/production.json", {"s3:if-none-match": "*"}, False),
        ("gc/mark.json", {}, True),
        ("gc/mark.json", {"s3:if-match": "e"}, False),
        (f"models/tickets/moving/{STAMPED}.json", {}, False),
    ],
)
def test_the_bucket_denies_an_unconditional_write_of_what_decides(
    path: str, headers: dict[str, str], expected: bool
) -> None:
    document, arn = policies.bucket_policy(ROOT), f"arn:aws:s3:::iam-bucket/qlora/{path}"
    create = {"s3:ObjectCreationOperation": "true", **headers}
    assert is_denied(document, "s3:PutObject", arn, create) is expected
    # A part of an upload has no such header.
    assert not is_denied(document, "s3:PutObject", arn, {"s3:ObjectCreationOperation": "false"})


def test_a_role_signs_with_its_own_key_alone(config: LineConfig) -> None:
    head = "arn:aws:kms:eu-west-1:111122223333"
    for role in access.roles("tickets"):
        document = policies.role_policy(config, role, ROOT, f"{head}:alias/qlora-{{role}}")
        own = {"kms:ResourceAliases": f"alias/qlora-{role.replace('.', '-')}"}
        another = {"kms:ResourceAliases": "alias/qlora-another"}
        signs = role not in ("gc", "pull", "mirror", "message")
        assert is_allowed(document, "kms:Sign", f"{head}:key/1", own) is signs
        assert not is_allowed(document, "kms:Sign", f"{head}:key/1", another)

    document = policies.role_policy(config, "evaluate", ROOT, f"{head}:key/1")
    assert is_allowed(document, "kms:Sign", f"{head}:key/1")
    assert not is_allowed(document, "kms:Sign", f"{head}:key/2")
    with pytest.raises(UsageError, match="expected arn:aws:kms"):
        policies.role_policy(config, "evaluate", ROOT, "arn:aws:s3:::iam-bucket/key/1")


def test_a_role_that_is_not_there_and_a_store_that_is_not_in_s3_are_refused(config: LineConfig) -> None:
    with pytest.raises(UsageError, match="expected one of planner, validate_data"):
        policies.role_policy(config, "publish", ROOT)
    with pytest.raises(UsageError, match="expected s3://bucket/prefix"):
        policies.role_policy(config, "gc", "/srv/store")


# --- the same, asked of a server


class Aws:
    """An AWS on loopback whose IAM is enforced; `become` gives the environment a role's credentials."""

    def __init__(self, endpoint: str, patch: pytest.MonkeyPatch) -> None:
        self.endpoint, self._patch = endpoint, patch
        self.admin("s3").create_bucket(Bucket="iam-bucket")
        self.admin("s3").create_bucket(Bucket="data")

    @functools.cache  # noqa: B019 - it lives as long as its test
    def admin(self, service: str) -> Any:
        keys = {"aws_access_key_id": "admin", "aws_secret_access_key": "admin"}
        return boto3.client(service, region_name="us-east-1", endpoint_url=self.endpoint, **keys)

    def make_role(self, role: str, document: Document) -> dict[str, str]:
        """Make a role with a policy as far as moto enforces one; return the credentials of a session of it."""
        statements = [{name: part for name, part in s.items() if name != "Condition"} for s in document["Statement"]]
        for statement in statements:
            if statement["Sid"] == "Delete":
                statement["Resource"] = [*statement["Resource"], "arn:aws:s3:::iam-bucket"]
        iam, trust = self.admin("iam"), {"Version": "2012-10-17", "Statement": []}
        role = f"{role}-{uuid.uuid4().hex[:8]}"  # all servers of this process share their roles
        arn = iam.create_role(RoleName=role, AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"]
        policy = json.dumps({**document, "Statement": statements})
        iam.put_role_policy(RoleName=role, PolicyName="tickets", PolicyDocument=policy)
        session = self.admin("sts").assume_role(RoleArn=arn, RoleSessionName="test")["Credentials"]
        return {
            "AWS_ACCESS_KEY_ID": session["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": session["SecretAccessKey"],
            "AWS_SESSION_TOKEN": session["SessionToken"],
        }

    def become(self, credentials: dict[str, str]) -> None:
        for name, value in {
            **credentials,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            self._patch.setenv(name, value)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            self._patch.setenv(name, "/dev/null")


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Aws]:
    from moto.server import ThreadedMotoServer

    caplog.set_level("ERROR", "werkzeug")  # a line for each request takes longer than the request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield Aws(f"http://127.0.0.1:{server.get_host_and_port()[1]}", monkeypatch)
    server.stop()


@pytest.fixture
def enforce(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From this call on, every server of this process asks IAM; until the test ends."""
    from moto import settings
    from moto.core.authorization import ActionAuthenticatorMixin

    monkeypatch.setattr(ActionAuthenticatorMixin, "request_count", 0)
    return lambda: monkeypatch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)


def test_a_server_with_iam_gives_the_same_answers(
    aws: Aws, documents: dict[str, Document], enforce: Callable[[], None]
) -> None:
    sessions = {role: aws.make_role(role, document) for role, document in documents.items()}
    enforce()
    differences = []
    for role, session in sessions.items():
        aws.become(session)
        client = boto3.session.Session().client("s3")  # the module's own session would remember the first credentials
        for path, expected in TABLE.items():
            where = {"Bucket": "iam-bucket", "Key": path}
            for call, roles in zip((client.get_object, client.put_object, client.delete_object), expected, strict=True):
                try:
                    call(**where)
                    allowed = True
                except ClientError as error:
                    allowed = error.response["Error"]["Code"] != "AccessDenied"
                if allowed is not (role in {ROLES[letter] for letter in roles}):
                    differences.append((role, call.__name__, path))
        client.close()
    assert differences == []


# What each request of the store asks of IAM. Of an upload in parts only its end makes an object.
IAM_ACTIONS = {
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "PutObject": "s3:PutObject",
    "CopyObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "DeleteObjects": "s3:DeleteObject",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "PutObjectRetention": "s3:PutObjectRetention",
}
IS_PART = ("CreateMultipartUpload", "UploadPart")


@dataclass(frozen=True)
class Request:
    """A request that a store sent: as whom, what it asks of IAM, and the condition keys that it has."""

    key_id: str
    action: str
    arn: str
    context: dict[str, str]


def as_requests(operation: str, message: Any) -> list[Request]:
    url = urlsplit(message.url)
    key_id = re.search(r"Credential=([^/]+)", message.headers["Authorization"].decode())
    assert key_id is not None
    bucket_arn = f"arn:aws:s3:::{url.path.strip('/').partition('/')[0]}"
    headers = {f"s3:{name}": "x" for name in ("if-match", "if-none-match") if name in message.headers}
    context = {**headers, "s3:ObjectCreationOperation": str(operation not in IS_PART).lower()}
    if operation == "ListMultipartUploads":
        arns = [bucket_arn]
    elif operation == "ListObjectsV2":
        context["s3:prefix"] = parse_qs(url.query)["prefix"][0]
        arns = [bucket_arn]
    elif operation == "DeleteObjects":
        arns = [f"{bucket_arn}/{unescape(key)}" for key in re.findall(r"<Key>(.*?)</Key>", message.body.decode())]
    else:
        arns = [f"arn:aws:s3:::{unquote(url.path.strip('/'))}"]
    requests = [Request(key_id[1], IAM_ACTIONS[operation], arn, context) for arn in arns]
    if source := message.headers.get("x-amz-copy-source"):
        arn = f"arn:aws:s3:::{unquote(source.decode() if isinstance(source, bytes) else source)}"
        requests.append(Request(key_id[1], "s3:GetObject", arn, {}))
    return requests


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Every request of every store from now on."""
    recorded: list[Request] = []
    make = S3Store.__init__

    def make_and_listen(store: S3Store, uri: str, **options: Any) -> None:
        make(store, uri, **options)
        store.client.meta.events.register(
            "before-send.s3",
            lambda request, event_name, **_: recorded.extend(as_requests(event_name.rpartition(".")[2], request)),
        )

    monkeypatch.setattr(S3Store, "__init__", make_and_listen)
    return recorded


@pytest.mark.usefixtures("own_signal_handlers")
def test_a_whole_run_needs_no_more_than_its_roles_have_and_a_step_cannot_publish(
    line: Path,
    small_steps: dict[str, Callable[..., StepResult]],
    aws: Aws,
    enforce: Callable[[], None],
    requests: list[Request],
    tmp_path: Path,
) -> None:
    config, root = load(line), f"{ROOT}/{uuid.uuid4().hex}"
    documents = {role: policies.role_policy(config, role, root) for role in access.roles(config.line)}
    sessions = {role: aws.make_role(role, document) for role, document in documents.items()}
    enforce()

    aws.become(sessions["planner"])
    plan = make_plan.make_plan(line, root)
    for step in graph.STEPS:
        aws.become(sessions[access.step_role(step, config.line)])
        ending = execute.run_step(plan, step.name, lambda step=step: small_steps[step.name])  # type: ignore[misc]
        assert ending.code == 0, ending.reason
    run_endings.write_to_store(root, plan.run_id, ending)

    aws.become(sessions["planner"])
    assert make_plan.find_plan(open_store(root), plan.run_id) == plan
    assert status.exit_code(plan, "publish") == 0
    assert run_endings.read(open_store(root), plan.run_id, "publish") == ending
    aws.become(sessions["pull"])
    release = pull.pull(open_store(root), "intents@production", tmp_path / "model")
    assert release.provenance["run_id"] == plan.run_id

    # The next run keeps out of training what this one has evaluated.
    aws.become(sessions["planner"])
    write_jsonl(line.parent / "tickets.jsonl", ticket_rows(31))
    later = make_plan.make_plan(line, root)
    assert later.history is not None
    aws.become(sessions["validate_data"])
    assert execute.run_step(later, "validate_data", lambda: small_steps["validate_data"]).code == 0

    # What a step that was killed has left. All else is named by production or by the line's newest plan.
    store = S3Store(root)
    store.write_if_absent(f"artifacts/dataset/{KEY}/lost/train.jsonl", b"{}")
    bucket, prefix = root.removeprefix("s3://").split("/", 1)
    store.client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/artifacts/dataset/{KEY}/lost/big")
    # A move is under way.
    aws.become(sessions[access.step_role(graph.step("publish"), config.line)])
    open_store(root).write_if_absent(collection_mark.moving_path(config.line, release.version), b"{}")
    aws.become(sessions["gc"])
    at = datetime.now(UTC) + timedelta(days=400)
    collection = collect.collect(S3Store(root), is_dry_run=False, at=at)
    assert [item.kind for item in collection.items] == ["attempt", "upload"]
    with pytest.raises(SystemExit, match=r"^0$"):
        main.main(["gc", "--root", root])

    # What moto's IAM does not know: each role's conditions, and the bucket's own policy.
    own = {sessions[role]["AWS_ACCESS_KEY_ID"]: document for role, document in documents.items()}
    bucket = policies.bucket_policy(root)
    for request in requests:
        assert is_allowed(own[request.key_id], request.action, request.arn, request.context), request
        assert not is_denied(bucket, request.action, request.arn, request.context), request
    assert {request.action for request in requests} >= set(IAM_ACTIONS.values()) - {"s3:PutObjectRetention"}
    aliases = [r for r in requests if r.action == "s3:PutObject" and "/aliases/" in r.arn]
    assert len(aliases) == 2
    assert all(is_denied(bucket, r.action, r.arn, {"s3:ObjectCreationOperation": "true"}) for r in aliases)

    # What a stolen step's credentials do with the same functions: nothing.
    aws.become(sessions["train_qlora"])
    store = open_store(root)
    with pytest.raises(UsageError, match="AccessDenied"):
        store.write_if_absent("models/intents/aliases/staging.json", b"{}")
    with pytest.raises(UsageError, match="AccessDenied"):
        store.write_if_absent(artifact.manifest_path("evaluation", "0" * 64), b"{}")
    with pytest.raises(UsageError, match="AccessDenied"):
        store.swap(f"runs/{plan.run_id}/plan.json", b"{}", store.read(f"runs/{plan.run_id}/plan.json").tag)

    aws.become(sessions["gc"])
    dropped = artifact.drop(open_store(root), "evaluation", plan.step("evaluate").key)
    assert [name.partition("/")[0] for name in dropped] == ["evaluation", "model", "release"]
