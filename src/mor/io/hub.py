"""Upload models to the Hugging Face hub."""

from pathlib import Path

from mor.errors import CheckpointError, MissingExtraError
from mor.io.checkpoint import WEIGHTS, has_weights, load_config, resolve
from mor.io.model_card import CARD, model_card

_FILES = ("*.json", "*.safetensors", "*.jinja", "*.py", CARD)  # not the trainer's state


def push_to_hub(
    path: Path | str,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload model",
) -> str:
    """Upload a checkpoint (or a run's newest one) as one commit; returns the commit's address.

    Creates the repository if it does not exist. A folder without a model card gets one there.

    Args:
        repository: `owner/name`.
        token: access token; None takes the stored one of `hf auth login`, or HF_TOKEN.

    Raises:
        CheckpointError: there is no whole model, or the hub refuses it or cannot be reached.
        MissingExtraError: the extra `hf` is not installed.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hf") from error
    folder = resolve(path)
    config = load_config(folder)
    if not has_weights(folder):
        raise CheckpointError(f"{folder} has no {WEIGHTS}: the checkpoint is not complete.")
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if not (folder / CARD).is_file():
            text = model_card(config, name=repository.split("/")[-1])
            api.upload_file(
                path_or_fileobj=text.encode("utf-8"), path_in_repo=CARD, repo_id=repository
            )
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=repository,
            commit_message=message,
            allow_patterns=list(_FILES),
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(f"{repository}: the hub did not take it: {error}") from error
    return str(commit.commit_url)
