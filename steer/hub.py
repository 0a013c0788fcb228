"""Methods on the Hugging Face Hub: a repository holds what `Method.save` writes, and a card for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

if TYPE_CHECKING:
    from steer.method import Method


def is_id(source: str | Path) -> bool:
    """Whether this can be a repository: "owner/name"."""
    if not isinstance(source, str) or source.count("/") != 1:
        return False
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def download(
    repo_id: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder of the Hub's cache that holds these files of a repository, as far as it has them.

    Raises:
        FileNotFoundError: no such repository or revision, or it is neither in the cache nor within reach.
    """
    at = "" if revision is None else f" at {revision}"
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=list(files),
            library_name="steer",
        )
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"the repository {repo_id} is gated: ask for access at {constants.ENDPOINT}/{repo_id}, then run "
            "`hf auth login` or give token="
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"the repository {repo_id} has no revision {revision}: give a branch, tag or commit that "
            f"{constants.ENDPOINT}/{repo_id}/commits/main lists"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {repo_id} here, and the Hub has no repository of that name that you may read: check "
            "the name; for a private one run `hf auth login` or give token="
        ) from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the Hub cannot be reached"
        raise FileNotFoundError(
            f"there is no folder {repo_id} here, {why}, and {repo_id}{at} is not (or not as a whole) in the cache "
            f"{cache_dir or constants.HF_HUB_CACHE}: load it once with a connection, or copy its folder here"
        ) from error
    return Path(folder)


def upload(
    method: Method,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """See `Method.push_to_hub`."""
    from steer.model_card import write

    api: Any = HfApi(token=token, library_name="steer")
    with TemporaryDirectory() as made:
        folder = Path(made)
        method.save(made)  # first: what cannot be saved makes no repository
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        write(method, repo_id, folder)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(file.name, file) for file in sorted(folder.iterdir())],
            commit_message=commit_message or f"Upload {type(method).__name__} of steer",
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.pr_url or commit.commit_url)
