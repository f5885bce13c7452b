"""The keys of a store: made, replaced, lost, handed out, in files and in AWS KMS."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from qlora_retrain.core import graph
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import execute, make_plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, key_admin, keys, kms, open_store, pull, registry
from qlora_retrain.storage.store import Store
from tests.storage import p256

Steps = dict[str, Callable[..., StepResult]]
RunAll = Callable[[Plan], dict[str, int]]
REFERENCE = "intents@production"


@pytest.fixture
def store(root_uri: str) -> Store:
    return open_store(root_uri)


@pytest.fixture
def published(line: Path, root_uri: str, run_all: RunAll) -> Plan:
    """The plan of a run that published a version in a new store, which has keys."""
    plan = make_plan.make_plan(line, root_uri)
    assert set(run_all(plan).values()) == {0}
    return plan


@pytest.fixture
def without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No keys are made for a new store, as in a container."""
    monkeypatch.setenv("QLORA_RETRAIN_IMAGE", "image@sha256:" + "0" * 64)


def key_files(store: Store) -> dict[str, int]:
    folder = keys.keys_folder(store.uri)
    return {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}


def test_a_new_store_in_a_folder_has_a_key_for_each_role_that_only_its_owner_reads(
    published: Plan, store: Store
) -> None:
    roles = {"planner", *(s.name for s in graph.STEPS if s.name != "publish"), "publish-intents"}
    files = key_files(store)
    assert {name.removesuffix(".pem") for name in files if name.endswith(".pem")} == roles
    assert {files[f"{role}.pem"] for role in roles} == {0o600}
    assert stat.S_IMODE(keys.keys_folder(store.uri).stat().st_mode) == 0o700
    assert not keys.keys_folder(store.uri).is_relative_to(store.uri.removeprefix("file://"))


def test_a_store_in_which_only_a_failure_was_written_is_new(line: Path, root_uri: str, store: Store) -> None:
    store.write_if_absent("runs/20260131T030000Z-0123456789ab/endings/plan.json", b"{}")
    assert make_plan.make_plan(line, root_uri).signature is not None


def test_what_a_run_writes_is_signed_by_the_role_that_writes_it(published: Plan, store: Store) -> None:
    """Each signature is checked by the arithmetic of the curve, over the text that `signatures.py` describes."""
    folder = Path(store.uri.removeprefix("file://"))
    version = registry.read_release(store, "intents", pull.resolve(store, REFERENCE)[0].version).version
    signed = {f"runs/{published.run_id}/plan.json": "planner"}
    signed |= {artifact.manifest_path(s.makes, published.step(s.name).key): s.name for s in graph.STEPS}
    signed |= {
        f"models/intents/versions/{version}/manifest.json": "publish",
        "models/intents/aliases/latest.json": "publish",
        "models/intents/aliases/production.json": "publish",
    }
    trust = json.loads((keys.keys_folder(store.uri) / "trust.json").read_text())
    for path, role in signed.items():
        document = json.loads((folder / path).read_text())
        signature = document.pop("signature")
        text = json.dumps(
            {"document": document, "path": path}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )
        public = trust["roles"]["publish-intents" if role == "publish" else role]["key"]
        assert signature["key"] == public, path
        data = b"qlora-retrain document 1\n" + text.encode()
        assert p256.is_valid(public, base64.b64decode(signature["value"]), data), path
        assert not p256.is_valid(public, base64.b64decode(signature["value"]), data + b" "), path


def test_a_store_without_keys_works_and_says_so(
    without_keys: None,
    line: Path,
    root_uri: str,
    run_all: RunAll,
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = make_plan.make_plan(line, root_uri)
    assert set(run_all(plan).values()) == {0}
    assert plan.signature is None
    pull.pull(store, REFERENCE, tmp_path / "pulled")
    assert pull.recorded_signer(tmp_path / "pulled") is None
    assert capsys.readouterr().out.count("nothing in this store is signed") == len(graph.STEPS)


def test_what_was_there_before_the_keys_is_accepted_as_it_was(
    without_keys: None, published: Plan, store: Store, tmp_path: Path, line: Path, run_all: RunAll
) -> None:
    key_admin.create(store, ["intents"])
    pull.pull(store, REFERENCE, tmp_path / "pulled")
    # A new run finds every artifact of before, and judges its challenger against the unsigned champion.
    rows = line.parent / "tickets.jsonl"
    rows.write_text(rows.read_text() + "{}\n")
    plan = make_plan.make_plan(line, store.uri)
    assert plan.champion is not None
    assert plan.signature is not None
    assert set(run_all(plan).values()) == {0}
    assert pull.resolve(store, REFERENCE)[1]["signer"] is not None

    # A changed document of before is another document.
    path = Path(store.uri.removeprefix("file://")) / artifact.manifest_path(
        "dataset", published.step("validate_data").key
    )
    path.write_text(path.read_text().replace('"rows_train": 27', '"rows_train": 28'))
    with pytest.raises(IntegrityError, match="expected a signature by validate_data"):
        artifact.find_manifest(store, "dataset", published.step("validate_data").key)


def test_a_machine_without_the_keys_reads_and_pulls_but_writes_nothing(
    published: Plan, store: Store, line: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another home"))
    assert Plan.read(published.uri) == published
    pull.pull(store, REFERENCE, tmp_path / "pulled")
    release = pull.resolve(store, REFERENCE)[0]

    with pytest.raises(UsageError, match="is signed by planner, and this process has no keys of the store"):
        Plan.load(published.uri)
    with pytest.raises(UsageError, match="has no keys of the store"):
        make_plan.make_plan(line, store.uri)
    with pytest.raises(UsageError, match="has no keys of the store"):
        registry.move_alias(store, "intents", "staging", release, reason="a test")


def test_a_step_whose_keys_were_not_mounted_does_not_go_on(
    published: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(keys.KEYS_VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match=r"QLORA_RETRAIN_KEYS names .*nothing: expected trust\.json there"):
        Plan.load(published.uri)


def test_a_step_signs_with_the_one_private_key_that_it_was_given(
    line: Path, root_uri: str, store: Store, small_steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan.make_plan(line, root_uri)
    key_admin.export(store, ["validate_data"], tmp_path / "exported")
    assert {p.name for p in (tmp_path / "exported").iterdir()} == {"trust.json", "validate_data.pem"}
    monkeypatch.setenv(keys.KEYS_VARIABLE, str(tmp_path / "exported"))
    assert execute.run_step(plan, "validate_data", lambda: small_steps["validate_data"]).code == 0

    # The keys of `validate_data` are of no use to another step.
    ending = execute.run_step(plan, "quantize_model", lambda: small_steps["quantize_model"])
    assert ending.code == 12
    assert "the private key of quantize_model cannot be read" in ending.reason
    assert not list(store.children("artifacts/base_nf4"))


def test_a_lost_key_is_replaced_and_what_it_signed_stays_accepted(
    published: Plan, store: Store, line: Path, run_all: RunAll, tmp_path: Path
) -> None:
    (keys.keys_folder(store.uri) / "publish-intents.pem").unlink()
    release, record = pull.resolve(store, REFERENCE)
    with pytest.raises(UsageError, match=r"make a new one with: qlora-retrain keys rotate publish-intents"):
        registry.move_alias(store, "intents", "staging", release, reason="a test")

    old = record["signer"]
    key_admin.rotate(store, "publish-intents")
    pull.pull(store, REFERENCE, tmp_path / "pulled")
    registry.move_alias(store, "intents", "staging", release, reason="a test")
    assert pull.resolve(store, "intents@staging")[1]["signer"] != old


def test_a_copy_of_a_replaced_key_signs_nothing_new(published: Plan, store: Store, tmp_path: Path) -> None:
    folder = keys.keys_folder(store.uri)
    shutil.copy(folder / "publish-intents.pem", tmp_path / "stolen.pem")
    key_admin.rotate(store, "publish-intents")
    shutil.copy(tmp_path / "stolen.pem", folder / "publish-intents.pem")
    with pytest.raises(UsageError, match=r"is not the key that trust\.json names for publish-intents"):
        registry.move_alias(store, "intents", "staging", pull.resolve(store, REFERENCE)[0], reason="a test")


def test_nothing_that_a_stolen_key_signed_is_accepted(published: Plan, store: Store) -> None:
    key_admin.rotate(store, "evaluate", is_stolen=True)
    with pytest.raises(IntegrityError, match="expected a signature by evaluate"):
        artifact.find_manifest(store, "evaluation", published.step("evaluate").key)
    # The other roles have nothing to do with it.
    assert artifact.find_manifest(store, "model", published.step("merge_adapter").key) is not None


def test_after_a_stolen_key_a_person_accepts_what_is_right_and_the_line_goes_on(
    published: Plan, store: Store, line: Path, tmp_path: Path
) -> None:
    version = pull.resolve(store, REFERENCE)[0].version
    key_admin.rotate(store, "publish-intents", is_stolen=True)
    with pytest.raises(IntegrityError, match="expected a signature by publish-intents"):
        make_plan.make_plan(line, store.uri)

    alias, manifest = "models/intents/aliases/production.json", f"models/intents/versions/{version}/manifest.json"
    key_admin.accept(store, [alias, manifest])
    plan = make_plan.make_plan(line, store.uri)
    assert plan.champion is not None
    pull.pull(store, REFERENCE, tmp_path / "pulled")
    # What is not accepted stays refused, and only documents that are signed can be accepted.
    with pytest.raises(IntegrityError, match="expected a signature by publish-intents"):
        registry.read_alias(store, "intents", "latest")
    with pytest.raises(UsageError, match="expected a plan, a manifest, an alias"):
        key_admin.accept(store, [f"models/intents/versions/{version}/README.md"])


def test_another_users_home_is_as_good_as_none(
    line: Path, root_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    # A user without a home and without a name: ~ stays as it is, and no folder of that name counts.
    with monkeypatch.context() as patch:
        patch.setattr("os.path.expanduser", lambda path: path)
        assert keys.default_folder(root_uri).is_relative_to("/~")
    monkeypatch.setenv("HOME", "/proc/1/nobody")
    assert keys.find_keyring(root_uri) is None
    plan = make_plan.make_plan(line, root_uri)
    assert plan.signature is None
    assert "no keys are made for this new store: /proc/1/nobody" in capsys.readouterr().out


def test_a_private_key_that_others_may_read_is_refused(published: Plan, store: Store) -> None:
    path = keys.keys_folder(store.uri) / "publish-intents.pem"
    path.chmod(0o640)
    with pytest.raises(UsageError, match="other users may read this private key; expected chmod 600"):
        registry.move_alias(store, "intents", "staging", pull.resolve(store, REFERENCE)[0], reason="a test")


def test_every_line_has_a_publishers_key_of_its_own(published: Plan, store: Store, line: Path) -> None:
    second = line.with_name("other.yaml")
    second.write_text(line.read_text().replace("line: intents", "line: other"))
    make_plan.make_plan(second, store.uri)
    keyring = keys.find_keyring(store.uri)
    assert keyring is not None
    assert keyring.public_keys("publish-other").isdisjoint(keyring.public_keys("publish-intents"))


def test_a_pull_records_the_key_and_refuses_another_one_later(
    published: Plan, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted = keys.find_keyring(store.uri)
    assert trusted is not None
    pem = tmp_path / "publisher.pem"
    pem.write_text(keys.as_pem(trusted.trust.roles["publish-intents"].key))
    expected = keys.read_fingerprint(str(pem))
    der = base64.b64decode("".join(pem.read_text().split("\n")[1:-2]))
    assert expected == hashlib.sha256(der).hexdigest()

    # A consumer has no keys of the store.
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "consumer"))
    pull.pull(store, REFERENCE, tmp_path / "pulled")
    pull.pull(store, REFERENCE, tmp_path / "new", verify_key=expected)
    assert pull.recorded_signer(tmp_path / "pulled") == expected

    # Somebody else's store: complete, valid in itself, signed with keys of their own.
    monkeypatch.delenv("XDG_CONFIG_HOME")
    folder = Path(store.uri.removeprefix("file://"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "forger"))
    for path in [*folder.glob("models/intents/aliases/*"), *folder.glob("models/intents/versions/*/manifest.json")]:
        document = json.loads(path.read_text())
        del document["signature"]
        path.write_text(json.dumps(document))
    for path in folder.glob("models/intents/aliases/*"):
        version = json.loads(path.read_text())["version"]
        manifest = folder / "models/intents/versions" / version / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "manifest_sha256": _sha256(manifest)}))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "consumer"))
    with pytest.raises(IntegrityError, match="as an earlier pull says, found no valid signature"):
        pull.pull(store, REFERENCE, tmp_path / "pulled")
    with pytest.raises(IntegrityError, match="as --verify-key says, found no valid signature"):
        pull.pull(store, REFERENCE, tmp_path / "newer", verify_key=expected)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_model_signings_own_command_verifies_a_pulled_version(published: Plan, store: Store, tmp_path: Path) -> None:
    pull.pull(store, REFERENCE, tmp_path / "pulled")
    keyring = keys.find_keyring(store.uri)
    assert keyring is not None
    (tmp_path / "key.pem").write_text(keys.as_pem(keyring.trust.roles["publish-intents"].key))
    folder = (tmp_path / "pulled" / "current").resolve()
    command = ["model_signing", "verify", "key", folder, "--signature", folder / "model.sig"]

    def verify() -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).parent / command[0]
        return subprocess.run(
            [program, *command[1:], "--public_key", tmp_path / "key.pem"], capture_output=True, text=True
        )

    assert "Verification succeeded" in verify().stdout
    (tmp_path / "pulled" / "model" / "model.safetensors").write_text("another model")
    ended = verify()
    assert ended.returncode == 1
    assert "model/model.safetensors" in ended.stderr


@pytest.fixture
def kms_keys(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Keys in KMS (moto's), by role; `alias/<prefix>-{role}` names them, and `prefix` is their prefix."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
    from moto.kms.utils import ECDSAPrivateKey

    # moto's server, which runs in this process, does not know MessageType=DIGEST and would hash the digest again.
    def sign(self: ECDSAPrivateKey, message: bytes, signing_algorithm: str) -> bytes:
        assert (len(message), signing_algorithm) == (32, "ECDSA_SHA_256")
        signature: bytes = self.private_key.sign(message, ec.ECDSA(Prehashed(hashes.SHA256())))
        return signature

    monkeypatch.setattr(ECDSAPrivateKey, "sign", sign)
    client = boto3.client("kms")
    prefix = uuid.uuid4().hex
    ids = {"prefix": prefix}
    for role in ["planner", *(s.name for s in graph.STEPS if s.name != "publish"), "publish-intents"]:
        ids[role] = client.create_key(KeyUsage="SIGN_VERIFY", KeySpec="ECC_NIST_P256")["KeyMetadata"]["KeyId"]
        client.create_alias(AliasName=f"alias/{prefix}-{role}", TargetKeyId=ids[role])
    return ids


def test_keys_in_kms_sign_and_no_private_key_is_in_a_file(
    kms_keys: dict[str, str], line: Path, root_uri: str, store: Store, run_all: RunAll, tmp_path: Path
) -> None:
    key_admin.create(store, ["intents"], f"alias/{kms_keys['prefix']}-{{role}}")
    assert not [name for name in key_files(store) if name.endswith(".pem")]
    plan = make_plan.make_plan(line, root_uri)
    assert set(run_all(plan).values()) == {0}
    pull.pull(store, REFERENCE, tmp_path / "pulled")
    assert pull.recorded_signer(tmp_path / "pulled") == keys.fingerprint(kms.public_key(kms_keys["publish-intents"]))


def test_a_key_in_kms_is_replaced_where_its_alias_points_to_another(
    kms_keys: dict[str, str], line: Path, root_uri: str, store: Store
) -> None:
    key_admin.create(store, ["intents"], f"alias/{kms_keys['prefix']}-{{role}}")
    with pytest.raises(UsageError, match="KMS still has the same key for alias/"):
        key_admin.rotate(store, "planner")
    plan = make_plan.make_plan(line, root_uri)
    key_admin.rotate(store, "planner", kms_key=kms_keys["evaluate"])
    Plan.load(plan.uri)
    # A key that was exchanged behind the keyring's back signs nothing that anybody would accept.
    boto3.client("kms").update_alias(AliasName=f"alias/{kms_keys['prefix']}-evaluate", TargetKeyId=kms_keys["planner"])
    keyring = keys.find_keyring(store.uri)
    assert keyring is not None
    with pytest.raises(UsageError, match=r"signed with another key than trust\.json names for evaluate"):
        keyring.sign("evaluate", b"text")
    again = make_plan.make_plan(line, root_uri)
    assert again.signature is not None
    assert again.signature.key == kms.public_key(kms_keys["evaluate"])


def test_a_key_that_kms_does_not_have_is_refused_with_its_answer(kms_keys: dict[str, str], store: Store) -> None:
    with pytest.raises(UsageError, match="KMS, alias/nothing-planner: get_public_key was refused: NotFoundException"):
        key_admin.create(store, ["intents"], "alias/nothing-{role}")
