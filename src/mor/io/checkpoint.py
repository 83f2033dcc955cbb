"""Save and load models, in Hugging Face's layout.

    DIR/config.json  model.safetensors  tokenizer.json  generation_config.json

A training run's folder holds many such folders under `checkpoints/step-NNNNNNNN`; wherever a model
is asked for, the run's folder stands for its newest complete checkpoint.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mor.errors import CheckpointError, ConfigError
from mor.io.atomic_files import staged_folder, storage_error
from mor.io.tokenizer import Tokenizer
from mor.io.weights import read_weights
from mor.model.config import MoRConfig
from mor.model.transformer import MoRModel

CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"
MODEL_TYPE = "mor"

# Keys of config.json that follow from our fields and are written for third-party tools.
_DERIVED = ("model_type", "architectures", "num_hidden_layers", "dtype", "auto_map")


def save(model: MoRModel, path: Path | str, tokenizer: Tokenizer | None = None) -> None:
    """Write a model (and its tokenizer) to a folder.

    A new folder appears complete or not at all; in an existing one each file is replaced in one
    step and other files are left alone.

    Raises:
        CheckpointError: the place cannot be written.
        CapacityError: the disk is full; what was there before is still there.
    """
    target = Path(path)
    try:
        if not target.exists():
            with staged_folder(target) as staged:
                write_model(model, staged, tokenizer)
            return
        fresh = target / ".new"
        shutil.rmtree(fresh, ignore_errors=True)  # what a killed process left
        with staged_folder(fresh) as staged:
            write_model(model, staged, tokenizer)
        for file in sorted(fresh.iterdir(), key=lambda f: f.name == CONFIG):  # the config last
            file.replace(target / file.name)
        fresh.rmdir()
    except OSError as error:
        raise storage_error(target, error, CheckpointError) from error


def save_new(
    model: MoRModel,
    path: Path | str,
    tokenizer: Tokenizer | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a model to a new folder, which appears complete or not at all.

    Args:
        generation: contents of `generation_config.json`; None: the model's own special tokens.

    Raises:
        CheckpointError: the folder exists or cannot be written, or the tokenizer is another
            model's.
        CapacityError: the disk is full.
    """
    target = Path(path)
    if target.exists():
        raise CheckpointError(f"{target} exists: choose a new folder, or remove it first.")
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model only "
            f"{model.config.vocab_size}: they do not belong together."
        )
    try:
        with staged_folder(target) as staged:
            write_model(model, staged, tokenizer)
            if generation:
                (staged / GENERATION).write_text(json.dumps(dict(generation), indent=2) + "\n")
    except OSError as error:
        raise storage_error(target, error, CheckpointError) from error


def write_model(model: MoRModel, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write the files of a checkpoint into an existing folder."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    try:
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)  # safetensors leaves it readable by its owner alone
    except SafetensorError as error:  # hides the operating system's error number
        full = "No space left" in str(error) or "os error 28" in str(error)
        raise OSError(28 if full else 5, str(error)) from error
    (folder / CONFIG).write_text(json.dumps(config_json(model), indent=2) + "\n")
    (folder / GENERATION).write_text(json.dumps(_generation_json(model.config), indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)


def config_json(model: MoRModel) -> dict[str, Any]:
    """Contents of `config.json`: our fields, and those that third-party tools read."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["MoRForCausalLM"],
        "num_hidden_layers": model.config.num_hidden_layers,
        "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
        **model.config.to_dict(),
    }


def _generation_json(config: MoRConfig) -> dict[str, Any]:
    tokens = {n: getattr(config, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {k: v for k, v in tokens.items() if v is not None}


def load(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> MoRModel:
    """The model in a checkpoint's folder, or in a run's newest checkpoint, in evaluation mode.

    Args:
        dtype: of the parameters; None keeps the file's.

    Raises:
        CheckpointError: something is missing, damaged or does not fit; the message names it.
    """
    folder = resolve(path)
    config = load_config(folder)
    if not has_weights(folder):
        raise CheckpointError(f"{folder} has no {WEIGHTS}: the checkpoint is not complete.")
    stored_names = read_weights(folder)
    # `save_pretrained` of transformers writes the same names after "model.".
    state = {name.removeprefix("model."): value for name, value in stored_names.items()}
    model = MoRModel(config)
    _check_state(folder / WEIGHTS, state, model)
    stored = next(iter(state.values())).dtype
    model = model.to(dtype or stored)
    model.load_state_dict(state, strict=False)
    return model.to(device).eval()


def has_weights(folder: Path) -> bool:
    """Whether a folder holds safetensors, in one file or in shards with an index."""
    return any((folder / name).is_file() for name in (WEIGHTS, f"{WEIGHTS}.index.json"))


def load_config(path: Path | str) -> MoRConfig:
    """The config in a checkpoint's `config.json`.

    Raises:
        CheckpointError: it is missing, not JSON, or of another kind of model.
    """
    folder = resolve(path)
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}.") from error
    if not isinstance(values, dict) or values.get("model_type") != MODEL_TYPE:
        kind = values.get("model_type") if isinstance(values, dict) else None
        raise CheckpointError(
            f"{folder / CONFIG} describes a model of type {kind!r}, not {MODEL_TYPE!r}."
        )
    theirs = set(_DERIVED)
    if "transformers_version" in values:  # saved by transformers, with many fields of its own
        theirs |= set(values) - {f.name for f in fields(MoRConfig)}
    try:
        return MoRConfig.from_dict({k: v for k, v in values.items() if k not in theirs})
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error


def end_token_ids(folder: Path) -> tuple[int, ...]:
    """The end-of-text ids, often several, in a checkpoint's `generation_config.json`.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    file = folder / GENERATION
    if not file.is_file():
        return ()
    try:
        given = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise CheckpointError(f"{file}: eos_token_id={given!r} must be a token id or a list.")
    return tuple(ids)


def resolve(path: Path | str) -> Path:
    """`path` if it is a checkpoint's folder; if it is a run's, its newest complete checkpoint.

    Raises:
        CheckpointError: it is neither.
    """
    folder = Path(path)
    if (folder / CONFIG).is_file():
        return folder
    newest = newest_step(folder)
    if newest is not None:
        return newest
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist: give a checkpoint's or a run's folder.")
    raise CheckpointError(
        f"{folder} holds no model: it has neither {CONFIG} nor a complete checkpoint under "
        f"checkpoints{os.sep}step-*."
    )


def newest_step(run: Path) -> Path | None:
    """Folder of a run's newest complete checkpoint; None if there is none."""
    complete = [c.parent for c in (run / "checkpoints").glob(f"step-*/{CONFIG}")]
    return max(complete, key=lambda c: c.name, default=None)


def _check_state(path: Path, state: dict[str, torch.Tensor], model: MoRModel) -> None:
    expected = {name: value.shape for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
        state.pop("lm_head.weight", None)
    for name, shape in expected.items():
        if name not in state:
            raise CheckpointError(f"{path} lacks {name!r}, which its config.json asks for.")
        if state[name].shape != shape:
            raise CheckpointError(
                f"{path}: {name!r} has shape {tuple(state[name].shape)}, its config.json asks for "
                f"{tuple(shape)}."
            )
    unexpected = sorted(set(state) - set(expected))
    if unexpected:
        raise CheckpointError(
            f"{path} holds {unexpected[0]!r}, for which its config.json has no place."
        )
