"""Uploading a result to the Hugging Face Hub, and saying before a run whether that can work."""

import os
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ConfigError

# A run's own: what resumes it and what it logged stay here.
NOT_UPLOADED = ["checkpoint-*", ".*", "*_png/*", "resolved_config.yaml", "data_report.json"]


def check_can_push() -> None:
    """Raises `ConfigError` where an upload is bound to fail, before any work is done for it."""
    import huggingface_hub

    way = "or leave push_to_hub out and upload the result later with `hf upload`"
    if huggingface_hub.constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1":
        raise ConfigError(f"push_to_hub needs the hub, and HF_HUB_OFFLINE is set; unset it, {way}")
    if huggingface_hub.get_token() is None:
        raise ConfigError(
            f"push_to_hub needs a token, and none is here; run `hf auth login`, set HF_TOKEN, {way}"
        )


def push_folder(
    folder: Path,
    name: str,
    *,
    private: bool | None,
    revision: str | None,
    message: str,
) -> str:
    """Uploads the result in `folder` to the model repository `name`; returns its address.

    Raises `CheckpointError` where the hub can't be reached or refuses; `folder` stays as it is.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    check_can_push()
    api: Any = huggingface_hub.HfApi()
    http_error: Any = HfHubHTTPError.__mro__[1]  # of httpx, or of requests: the client in use
    try:
        repo = api.create_repo(name, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            commit_message=message,
            revision=revision,
            ignore_patterns=NOT_UPLOADED,
        )
    except (http_error, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"push_to_hub to {name!r} failed: {reason}; the result is whole in {str(folder)!r}: "
            f"upload it with `hf upload {name} {folder}`"
        ) from error
    return f"https://huggingface.co/{repo}"
