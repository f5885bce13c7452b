"""What a mirror asks of one repository of the Hugging Face Hub, by the Hub's own client, with our errors.

No error quotes a token or the address of an upload, which holds a signature.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from qlora_retrain.core import uris, visible_text
from qlora_retrain.core.errors import Cause, Problem, TryAgain, UsageError
from qlora_retrain.storage import hub_secrets, mirror_access

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete

# Others of 4xx would be answered again in the same way. 409 and 412: somebody else writes at the same time.
_STATUSES_TO_RETRY = (408, 409, 412, 425, 429)
_MAX_REASON_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a commit.

    Attributes:
        blob_id: Git's id of what the commit has: the file, or of a large one its pointer.
        sha256: Of a large file (LFS), the hash of its bytes.
    """

    blob_id: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Refs:
    """The commits that a repository's names lead to."""

    branches: dict[str, str]
    tags: dict[str, str]


class HubRepository:
    """A repository that exists.

    Args:
        name: `owner/name`.
    """

    def __init__(self, name: str) -> None:
        try:
            from huggingface_hub import HfApi
            from huggingface_hub.utils.tqdm import disable_progress_bars
        except ValueError:  # while it parses HF_ENDPOINT
            raise UsageError(f"hf://{name}: {hub_secrets.UNSENDABLE}") from None

        # They would fill a task's log with pieces of lines.
        disable_progress_bars()
        hub_secrets.mask_log()
        self.name = name
        self._api = HfApi(endpoint=mirror_access.read("HF_ENDPOINT"), token=mirror_access.read("HF_TOKEN"))

    @property
    def url(self) -> str:
        """Where a person finds it."""
        return f"{self._api.endpoint}/{self.name}"

    def refs(self) -> Refs:
        """Return its branches and tags."""
        with self._errors():
            refs = self._api.list_repo_refs(self.name)
        return Refs(
            {ref.name: ref.target_commit for ref in refs.branches}, {ref.name: ref.target_commit for ref in refs.tags}
        )

    def files(self, commit: str) -> dict[str, RemoteFile]:
        """Return the files of a commit by their paths."""
        from huggingface_hub.hf_api import RepoFile

        with self._errors():
            entries = list(self._api.list_repo_tree(self.name, recursive=True, revision=commit))
        return {
            entry.path: RemoteFile(entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def commit(self, operations: Sequence[Operation], branch: str, parent: str, title: str) -> str:
        """Upload what is not there yet, and commit to a branch that is at `parent`; return the new commit."""
        # Of another model card than the Hub would write; it is no error, and nobody here can change the card.
        with self._errors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            info = self._api.create_commit(
                self.name, operations, commit_message=title, revision=branch, parent_commit=parent
            )
        return str(info.oid)

    def create_branch(self, branch: str) -> None:
        """Create a branch at `main`, unless it exists."""
        with self._errors():
            self._api.create_branch(self.name, branch=branch, exist_ok=True)

    def delete_branch(self, branch: str) -> None:
        """Delete a branch, unless it is gone."""
        from huggingface_hub.errors import HfHubHTTPError

        with self._errors():
            try:
                self._api.delete_branch(self.name, branch=branch)
            except HfHubHTTPError as error:
                # Another process that mirrored the same version has deleted it.
                if error.response is None or error.response.status_code != 404:
                    raise

    def create_tag(self, tag: str, commit: str) -> None:
        """Create a tag, which must not exist."""
        # Without a message: an annotated tag would be an object of its own, which names the commit.
        with self._errors():
            self._api.create_tag(self.name, tag=tag, revision=commit)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn every error of the client into one of ours."""
        from httpx2 import HTTPError, InvalidURL

        try:
            yield
        except Problem:
            raise
        # The client wraps errors of its threads in RuntimeError, and reports bad answers as ValueError.
        except (OSError, RuntimeError, ValueError, HTTPError, InvalidURL) as error:
            self._raise(error)

    def _raise(self, error: BaseException) -> NoReturn:
        from huggingface_hub import errors

        chain = [error]
        while origin := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(origin)
        label = f"hf://{self.name}"
        if any(isinstance(link, errors.OfflineModeIsEnabled) for link in chain):
            raise UsageError(f"{label}: HF_HUB_OFFLINE is set, so nothing can be sent; unset it for this command")
        if any(hub_secrets.is_unsendable(link) for link in chain):
            raise UsageError(f"{label}: {hub_secrets.UNSENDABLE}") from None
        # Of a branch that another process has deleted meanwhile.
        if any(isinstance(link, errors.RevisionNotFoundError) for link in chain):
            raise TryAgain(f"{label}: another process mirrors the same version", cause=Cause.CONFLICT) from None
        response = next((link.response for link in chain if isinstance(link, errors.HfHubHTTPError)), None)
        status = None if response is None else response.status_code
        if status in (401, 403, 404):
            raise UsageError(
                f"{label}: the Hub answered {status}: no such repository, or HF_TOKEN may not write to it. Create it "
                f"with `hf repos create {self.name} --private`, and give the token the right to write to it"
            ) from None
        if status is not None and 400 <= status < 500 and status not in _STATUSES_TO_RETRY:
            raise UsageError(f"{label}: the Hub answered {status}: {_reason(error)}") from None
        if status is None and isinstance(error, ValueError):
            raise UsageError(f"{label}: {_reason(error)}") from None
        text = f"answered {status}" if status else f"cannot be reached ({type(chain[-1]).__name__})"
        cause = Cause.CONFLICT if status in (409, 412) else Cause.THROTTLED
        raise TryAgain(f"{label}: the Hub {text}; the next try goes on where this one stopped", cause=cause) from None


def _reason(error: BaseException) -> str:
    """Return what the Hub says, short and without what a terminal would obey or a URL's signature."""
    text = getattr(error, "server_message", None) or str(error)
    masked = uris.mask_secrets_of_errors(" ".join(text.split()))
    return visible_text.escape_controls(masked)[:_MAX_REASON_CHARACTERS]
