"""Opening the model that a command line names, and starting the engine for it."""

from mor.cli.options.engine_options import select_device
from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.io.checkpoint import load, resolve
from mor.io.tokenizer import Tokenizer
from mor.model.transformer import MoRModel
from mor.terminal.console import err_console


def open_model(path: str, device: str | None) -> tuple[MoRModel, Tokenizer]:
    """The model and the tokenizer of a checkpoint, or of a run's newest checkpoint.

    Raises:
        CheckpointError: there is no whole model.
        DataError: there is no tokenizer beside it.
        ConfigError: there is no such device.
    """
    chosen = select_device(device)
    folder = resolve(path)
    return load(folder, device=chosen), Tokenizer.load(folder)


def start_engine(model: MoRModel, config: EngineConfig, tokenizer: Tokenizer) -> LLM:
    """The engine for a model; a note on the terminal says why it takes a while."""
    with err_console().status("starting the engine (once, compiling its kernels takes a while)"):
        return LLM(model, config, tokenizer=tokenizer)
