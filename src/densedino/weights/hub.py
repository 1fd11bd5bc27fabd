"""Owns weights on the Hugging Face hub: ids, snapshots in the hub's own cache, and what to do when it refuses."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from densedino.errors import DownloadError, InputError, require

__all__ = ["cached_snapshot", "fetch_snapshot", "hub_id"]

_NAME = r"[\w][\w.-]*/[\w][\w.-]*(?:@[\w./-]+)?"
_PATTERNS = ["*.json", "*.safetensors"]
_OLD_PATTERNS = ["*.json", "pytorch_model*.bin"]


def hub_id(text: str) -> str | None:
    """The repository (`owner/name`, perhaps `@revision`) that `text` names, None if it names none.

    Understood are `hf:owner/name`, `hf-hub:owner/name`, and without a prefix `facebook/…` and `timm/…`.

    Raises:
        InputError: a prefix before something that is no repository name.
    """
    scheme, colon, rest = text.partition(":")
    if colon and scheme in ("hf", "hf-hub", "hf_hub"):
        if not re.fullmatch(_NAME, rest):
            raise InputError(
                f"{text!r} is no hub id; write it as hf:owner/name, for example hf:timm/convnext_tiny.dinov3_lvd1689m"
            )
        return rest
    return text if re.fullmatch(_NAME, text) and text.startswith(("facebook/", "timm/")) else None


def fetch_snapshot(repository: str) -> Path:
    """Download a repository's weights and configuration into the hub's cache (resumed and verified by its client).

    Args:
        repository: `owner/name`, perhaps with `@revision`.

    Returns:
        The folder.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        DownloadError: gated, not there, no network, or without weights.
    """
    errors = require("huggingface_hub.errors", extra="interop", purpose=f"weights={repository!r}")
    name = repository.partition("@")[0]
    try:
        folder = _snapshot(repository, patterns=_PATTERNS)
        return folder if _has_weights(folder) else _snapshot(repository, patterns=_OLD_PATTERNS)
    except errors.GatedRepoError:
        raise DownloadError(
            f"{repository} is a gated repository. Accept its licence on https://huggingface.co/{name}, wait for the "
            "approval, and log in (hf auth login). The copies under timm/… are not gated."
        ) from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(
            f"{repository} is not on the hub, or is private. Check the name; if it is private, log in (hf auth login)."
        ) from None
    except errors.RevisionNotFoundError:
        raise DownloadError(f"{repository}: no such revision. Leave out what follows '@', or check it.") from None
    except errors.HFValidationError as error:
        raise InputError(f"{repository!r} is no name of a hub repository: {error}") from None
    except Exception as error:  # the client lets errors of several libraries through, and every one has this message
        raise DownloadError(
            f"{repository}: the hub cannot be reached, and its cache here has no copy ({type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0][:160]}). Check the connection, or pass the path of a file."
        ) from error


def cached_snapshot(repository: str | None) -> Path | None:
    """The folder of a repository that is wholly in the hub's cache, None if it is not (no network is used)."""
    if repository is None or importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = _snapshot(repository, patterns=_PATTERNS, local=True)
    except LocalEntryNotFoundError:
        return None
    return folder if _has_weights(folder) else None


def _snapshot(repository: str, *, patterns: list[str], local: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = repository.partition("@")
    return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns, local_files_only=local))


def _has_weights(folder: Path) -> bool:
    return any(path.is_file() for path in folder.glob("*.safetensors"))
