"""The training loop: batches in order, forward, backward, step, evaluate, save."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mor.data.corpus import build_from_documents
from mor.data.stdlib_corpus import stdlib_documents
from mor.errors import CapacityError, CheckpointError, ConfigError, MorError
from mor.io.atomic_files import storage_error, write_file
from mor.io.checkpoint import load, newest_step, resolve
from mor.io.tokenizer import TOKENIZER_FILE, Tokenizer
from mor.io.uptrain import init_from_vanilla
from mor.model.cost import depth_fractions_of
from mor.model.router import ExpertChoiceRouter, TokenChoiceRouter
from mor.model.transformer import MoRModel
from mor.train.calibrate import calibrate
from mor.train.checkpoint import TrainState, read_state, rng_state, set_rng_state
from mor.train.config import STDLIB, TrainConfig
from mor.train.distributed import World
from mor.train.evaluate import evaluate
from mor.train.metrics_file import MetricsFile
from mor.train.optim import build_optimizer, set_learning_rate
from mor.train.parallelize import parallelize
from mor.train.schedule import (
    balancing_strength,
    capacities_at_step,
    is_last_step,
    learning_rate,
    resolve_steps,
    total_steps,
)
from mor.train.spike_detector import Watch
from mor.train.tensorboard import TensorBoard, summary_writer
from mor.train.training_data import TrainingData
from mor.yaml_config import dump_yaml

StepMetrics = dict[str, Any]
Outcome = Literal["finished", "stopped"]

_EVAL_ROWS = 8  # sequences that an evaluation runs at a time

CHANGEABLE_ON_RESUME = frozenset(
    (
        *("eval_every", "save_every", "keep_checkpoints", "device", "verify_data"),
        *("spike_threshold", "tensorboard", "parallel", "fsdp_reshard"),
        *("activation_checkpointing", "compile"),
    )
)
"""What a resumed run may change without becoming another run."""


class Trainer:
    """One run in one folder.

    `run` trains until the last step or until `should_stop`, and leaves a checkpoint either way. A
    run that was killed resumes from its newest checkpoint with the losses it would have had.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        *,
        resume: str = "never",
        on_step: Callable[[StepMetrics], None] = lambda row: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Open data, model and run folder.

        Args:
            resume: `never`, `auto` (from the newest checkpoint in `out`, if any) or a checkpoint.
            on_step: gets each line of `metrics.jsonl` when it is there.
            should_stop: asked after each step.

        Raises:
            ConfigError: settings that cannot work, or that are not those of the run to resume.
            DataError: the data cannot be read, or does not fit the model.
            CheckpointError: nothing to resume from, or `out` holds a run that would be lost.
            MissingExtraError: `tensorboard` is set and not installed.
        """
        if config.tensorboard:
            summary_writer()
        self.config, self.out = config, out
        self._on_step, self._should_stop = on_step, should_stop
        self.world = World.join(config.parallel, _device(config.device))
        self.device = self.world.device
        checkpoint = self.world.on_rank0(lambda: _checkpoint_to_resume(out, resume))
        corpora = self.world.on_rank0(lambda: _prepare_data(config, out))
        with self.world.all_or_none():
            self.model = self._open(corpora, checkpoint).to(self.device)
            self.config = config = resolve_steps(config, self.model.config)
        self._parallel_model = parallelize(self.model, config, self.world)
        self.optimizer = build_optimizer(self.model, config)
        self.step = 0
        """Optimizer steps done."""
        self.elapsed = 0.0
        """Seconds that they took, evaluations and saves left out."""
        self.position = 0
        """Sequences that they read: where the data's order goes on."""
        self._calibrated = -1  # step whose weights the thresholds fit
        self.metrics = MetricsFile(out / "metrics.jsonl")
        if checkpoint is not None:
            self._resume(checkpoint)
        self.world.on_rank0(self._open_folder)
        self._watch = Watch(config, self.model.config, out, self.device, self.metrics.rows())
        board = config.tensorboard and self.world.rank == 0
        self._tensorboard = TensorBoard(out / "tensorboard", self.step) if board else None

    def _open(self, corpora: Sequence[tuple[Path, float]], checkpoint: Path | None) -> MoRModel:
        """Open the data and build the model; rank 0 checks the data for all."""
        verify = self.config.verify_data and self.world.rank == 0
        config = dataclasses.replace(self.config, verify_data=verify)
        data = TrainingData.open(config, corpora, self.world.micro_size(config))
        self.tokenizer, self._batches = data.tokenizer, data.batches
        self._document_end = data.eos_id if config.mask_documents else None
        self._eval_batches = data.valid.split(_EVAL_ROWS)
        self._calibration = () if data.calibration is None else data.calibration.split(_EVAL_ROWS)
        torch.manual_seed(config.seed)
        return self._build_model(data, checkpoint)

    @property
    def total_steps(self) -> float:
        """Steps of the whole run, as far as is known now."""
        return total_steps(self.config, self.step, self.elapsed)

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return is_last_step(self.step, self.total_steps)

    def run(self) -> Outcome:
        """Train; see the class.

        Raises:
            ConfigError: the loss is no number any more, or spikes.
            CapacityError: no memory or disk is left.
            MorError: another process of the run has ended.
        """
        with self.world.translate_peer_failure():
            return self._run()

    def _run(self) -> Outcome:
        config = self.config
        if self.finished:
            return "finished"
        self.model.train()
        started, tokens_before = time.perf_counter(), self.step * config.tokens_per_step
        last = False
        while not last:
            step_started = time.perf_counter()
            try:
                row = self._optimizer_step()
            except torch.OutOfMemoryError as error:
                raise CapacityError(
                    f"out of memory at step {self.step + 1}: lower micro_batch_size (now "
                    f"{config.micro_size}) or sequence_length (now {config.sequence_length})."
                ) from error
            row["step_s"], asked = self.world.max_over_ranks(
                time.perf_counter() - step_started, self._should_stop()
            )
            self.elapsed += row["step_s"]
            row["total_steps"] = round(self.total_steps)
            last = self.finished
            stopping = asked and not last
            if last or (config.eval_every and self.step % config.eval_every == 0):
                row |= self._evaluate()
            seconds = time.perf_counter() - started
            row |= {
                "seconds": seconds,
                "tokens_per_s": (row["tokens"] - tokens_before) / seconds,
            }
            if self.world.rank == 0:
                row |= self._watch.pace(row["step_s"] * self.world.size)
                self.metrics.append(row)
            if self._tensorboard is not None:
                self._tensorboard.append(row)
            due = config.save_every and self.step % config.save_every == 0
            if last or stopping or due:
                self.save()
            if self.world.rank == 0:
                self._on_step(row)
            if stopping:
                return "stopped"
        return "finished"

    def save(self) -> Path:
        """Write a checkpoint of the present step."""
        self._calibrate()
        state = TrainState(
            step=self.step,
            elapsed=self.elapsed,
            position=self.position,
            optimizer=self.optimizer.state_dict(),
            rng=rng_state(),
            settings=self._settings(),
        )
        keep = self.config.keep_checkpoints
        return self.world.save(self.out, self.model, state, self.tokenizer, keep)

    # -- one step -------------------------------------------------------------------------------

    def _optimizer_step(self) -> StepMetrics:
        config, model = self.config, self.model
        capacities = capacities_at_step(model.config, config, self.step)
        rate = learning_rate(config, self.step, self.total_steps)
        set_learning_rate(self.optimizer, rate)
        balancing = balancing_strength(config, self.step)
        sums: dict[str, Tensor] = {}
        mine = self.world.micro_batches(config, self.position)
        for index in mine:
            batch = self._batches.at(index).to(self.device)
            torch.manual_seed((config.seed * 2**32 + index) % 2**63)  # for a random router
            with self._parallel_model.micro_batch(last=index == mine[-1]):
                with torch.autocast(
                    self.device.type, torch.bfloat16, enabled=config.precision == "bf16"
                ):
                    options = {"capacities": capacities, "document_end": self._document_end}
                    out = self._parallel_model(batch[:, :-1], batch[:, 1:], **options)
                assert out.loss is not None
                assert out.total_loss is not None
                total = out.total_loss
                if balancing < 1 and "balancing_loss" in out.aux_losses:
                    weight = (1 - balancing) * model.config.balancing_coeff
                    total = total - weight * out.aux_losses["balancing_loss"]
                (total / len(mine)).backward()
            seen = {"loss": out.loss, **out.aux_losses}
            if isinstance(model.router, TokenChoiceRouter):
                seen["shares"] = model.router.fractions(out.recursion_counts.reshape(-1))
            for name, value in seen.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(mine)
        means = self.world.mean(sums)
        shares = means.pop("shares", None)
        norm = self.world.clip_grad_norm(model, config.clip or math.inf)
        try:
            self._watch.check(self.step + 1, float(means["loss"]), float(norm))
        except MorError as error:
            self.world.raise_on_rank0(error)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        depth_fractions = None
        if isinstance(model.router, TokenChoiceRouter):
            assert shares is not None
            depth_fractions = depth_fractions_of(model.config, shares.tolist())
            if model.config.balancing == "loss_free":
                model.router.update_bias(shares, balancing)
        self.step += 1
        self.position += config.batch_size
        return {
            "step": self.step,
            "tokens": self.step * config.tokens_per_step,
            "lr": rate,
            "grad_norm": float(norm),
            "flops": self._watch.count(self.step - 1, depth_fractions),
            **{name: float(value) for name, value in means.items()},
        }

    def _evaluate(self) -> StepMetrics:
        self._calibrate()
        whole = self.world.full_model(self.model)
        end = self._document_end
        result = self.world.on_rank0(lambda: evaluate(whole, self._eval_batches, end).as_dict())
        tokens = result.pop("tokens")
        return {**result, "eval_tokens": tokens}

    def _calibrate(self) -> None:
        """Fit the thresholds to the present weights, once per step."""
        if self._calibrated == self.step or not self._calibration:
            return
        if isinstance(self.model.router, ExpertChoiceRouter):
            whole = self.world.full_model(self.model)
            end = self._document_end
            fitted = self.world.on_rank0(lambda: calibrate(whole, self._calibration, end))
            self.model.set_thresholds(fitted)
        self._calibrated = self.step

    # -- setting up -----------------------------------------------------------------------------

    def _open_folder(self) -> None:
        out, settings = self.out, dataclasses.asdict(self.config)
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.metrics.truncate_after(
                self.step
            )  # what a killed run wrote after its last checkpoint
            write_file(out / "config.yaml", dump_yaml(settings).encode())
        except OSError as error:
            raise storage_error(out, error, CheckpointError) from error

    def _build_model(self, data: TrainingData, checkpoint: Path | None) -> MoRModel:
        config = self.config
        if checkpoint is not None:
            return load(checkpoint)
        source = config.init_from
        donor = load(source, dtype=torch.float32) if source is not None else None
        if source is not None:
            self._check_tokenizer(source)
        if donor is not None and not config.model:
            model = donor
            config.check_length(model.config)
        else:
            width = self.tokenizer.vocab_size if donor is None else donor.config.vocab_size
            values = {"eos_token_id": data.eos_id, "vocab_size": width, **config.model}
            built = dataclasses.replace(config, model=values).model_config()
            if donor is None:
                model = MoRModel(built)
            else:
                model = init_from_vanilla(donor, built, config.init, config.seed)
        if data.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"vocab_size={model.config.vocab_size} is less than the {data.vocab_size} "
                f"entries of the tokenizer in {config.corpora[0][0]}: raise it, or leave it out."
            )
        return model

    def _check_tokenizer(self, source: Path) -> None:
        """Raise ConfigError if a checkpoint's token ids mean something else than the data's."""
        theirs = resolve(source) / TOKENIZER_FILE
        if theirs.is_file() and Tokenizer.load(theirs).to_json() != self.tokenizer.to_json():
            raise ConfigError(
                f"init_from={source} has another tokenizer than the data in {self.config.data}: "
                f"build the data again with `mor data build --tokenizer {theirs}`."
            )

    def _settings(self) -> dict[str, Any]:
        plain = json.loads(json.dumps(dataclasses.asdict(self.config), default=str))
        return {k: v for k, v in plain.items() if k not in CHANGEABLE_ON_RESUME}

    def _resume(self, checkpoint: Path) -> None:
        with self.world.all_or_none():
            state = self._state_of(checkpoint)
        with self.world.all_or_none():
            optimizer = self.world.optimizer_state(checkpoint, state.optimizer)
        self.optimizer.load_state_dict(optimizer)
        set_rng_state(state.rng)
        self.step, self.elapsed, self.position = state.step, state.elapsed, state.position

    def _state_of(self, checkpoint: Path) -> TrainState:
        state = read_state(checkpoint)
        ours = self._settings()
        for key, value in state.settings.items():
            if key in ours and ours[key] != value:
                raise ConfigError(
                    f"cannot resume {checkpoint}: it was trained with {key}={value!r}, now "
                    f"{key}={ours[key]!r}; give the old value, or start a new run with init_from."
                )
        return state


def _checkpoint_to_resume(out: Path, resume: str) -> Path | None:
    newest = newest_step(out)
    if resume == "never":
        if newest is not None:
            raise CheckpointError(
                f"{out} holds a run with checkpoints up to {newest.name}: continue it with "
                "--resume auto, or choose another --out."
            )
        return None
    if resume == "auto":
        return newest
    checkpoint = resolve(resume)
    if newest is not None and checkpoint.parent == newest.parent and checkpoint != newest:
        raise CheckpointError(
            f"{out} has checkpoints after {checkpoint.name}, up to {newest.name}, which would get "
            "mixed up with new ones: remove them first, or start a new run with init_from."
        )
    return checkpoint


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is unknown: use auto, cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}: torch sees no GPU here; use device=cpu.")
    return device


def _prepare_data(config: TrainConfig, out: Path) -> list[tuple[Path, float]]:
    """The corpora with their weights; the standard library's is built inside the run's folder."""
    if config.data != STDLIB:
        return [(Path(path), weight) for path, weight in config.corpora]
    corpus = out / "data"
    if not (corpus / "index.json").is_file():
        vocab_size = int(config.model.get("vocab_size") or 4096)
        build_from_documents(stdlib_documents(), corpus, train_tokenizer=vocab_size)
    return [(corpus, 1.0)]
