"""`Trainer`: the training loop of one run: forward, backward, step, evaluate, save."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mor.errors import CapacityError, CheckpointError, ConfigError, MorError
from mor.io.atomic_files import storage_error, write_file
from mor.io.checkpoint import load, resolve
from mor.io.tokenizer import TOKENIZER_FILE, Tokenizer
from mor.io.uptrain import init_from_vanilla
from mor.model.cost import depth_fractions_of
from mor.model.router import ExpertChoiceRouter, TokenChoiceRouter
from mor.model.transformer import MoRModel
from mor.train.calibrate import calibrate
from mor.train.checkpoint import (
    TrainState,
    checkpoint_to_resume,
    load_optimizer_state,
    read_matching_state,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from mor.train.config import TrainConfig
from mor.train.distributed import World, resolve_device
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
from mor.train.spike_detector import SpikeDetector
from mor.train.tensorboard import TensorBoard, summary_writer
from mor.train.throughput import FlopsMeter, peak_memory, reset_peak_memory
from mor.train.training_data import TrainingData, prepare_corpora
from mor.yaml_config import dump_yaml

StepMetrics = dict[str, Any]
"""One line of `metrics.jsonl`."""
Outcome = Literal["finished", "stopped"]

_EVAL_BATCH_SIZE = 8  # sequences of one forward pass of an evaluation

CHANGEABLE_ON_RESUME = frozenset(
    {
        "eval_every",
        "save_every",
        "keep_checkpoints",
        "device",
        "verify_data",
        "spike_threshold",
        "tensorboard",
        "parallel",
        "fsdp_reshard",
        "activation_checkpointing",
        "compile",
    }
)
"""Fields of `TrainConfig` that a resumed run may change: none of them changes what is learned."""


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
            summary_writer()  # missing packages are named before anything is written
        self.config, self.out = config, out
        self._on_step, self._should_stop = on_step, should_stop
        self.world = World.join(config.parallel, resolve_device(config.device))
        self.device = self.world.device
        checkpoint = self.world.on_rank0(checkpoint_to_resume, out, resume)
        # Rank 0 may have to build a corpus; the others open it when it is complete.
        corpora = self.world.on_rank0(prepare_corpora, config, out)
        with self.world.all_or_none():
            self.model = self._open(corpora, checkpoint).to(self.device)
            self.config = config = resolve_steps(config, self.model.config)
        self._parallel_model = parallelize(self.model, config, self.world)
        # After `parallelize`: FSDP has replaced the parameters.
        self.optimizer = build_optimizer(self.model, config)
        self.step = 0
        """Optimizer steps done."""
        self.elapsed = 0.0
        """Seconds that they took, evaluations and saves left out."""
        self.position = 0
        """Sequences that they read: where the data's order goes on."""
        self._calibrated_step = -1  # the step whose weights the routing thresholds were fitted to
        self.metrics = MetricsFile(out / "metrics.jsonl")
        if checkpoint is not None:
            self._resume(checkpoint)
        # Rank 0 cuts metrics.jsonl back to the checkpoint; all read it after that.
        self.world.on_rank0(self._open_folder)
        rows = self.metrics.rows()
        self._spikes = SpikeDetector(config, out, rows)
        self._flops = FlopsMeter(config, self.model.config, self.device, rows)
        reset_peak_memory(self.device)  # an earlier run in this process may have used more
        shows = config.tensorboard and self.world.rank == 0
        self._tensorboard = TensorBoard(out / "tensorboard", self.step) if shows else None

    def _open(self, corpora: Sequence[tuple[Path, float]], checkpoint: Path | None) -> MoRModel:
        """Open the data and build the model."""
        # Rank 0 compares the shards' checksums for all ranks.
        verify = self.config.verify_data and self.world.rank == 0
        config = dataclasses.replace(self.config, verify_data=verify)
        data = TrainingData.open(config, corpora, self.world.micro_size(config))
        self.tokenizer, self._batches = data.tokenizer, data.batches
        self._document_end = data.eos_id if config.mask_documents else None
        self._eval_batches = data.valid.split(_EVAL_BATCH_SIZE)
        self._calibration_batches: tuple[Tensor, ...] = ()
        if data.calibration is not None:
            self._calibration_batches = data.calibration.split(_EVAL_BATCH_SIZE)
        torch.manual_seed(config.seed)  # every rank draws the same initial weights
        return self._build_model(data, checkpoint)

    @property
    def total_steps(self) -> float:
        """Optimizer steps of the whole run; with a budget of time as estimated now."""
        return total_steps(self.config, self.step, self.elapsed)

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return is_last_step(self.step, self.total_steps)

    def run(self) -> Outcome:
        """Train until the last step or until `should_stop`, and save.

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
            # Of all ranks: they must agree on the time, which ends a budget of time, and on the
            # wish to stop, or some would go on to the next exchange without the others.
            row["step_s"], asked = self.world.max_over_ranks(
                time.perf_counter() - step_started, self._should_stop()
            )
            self.elapsed += row["step_s"]
            row["total_steps"] = round(self.total_steps)
            last = self.finished
            stopping = asked and not last
            if last or (config.eval_every and self.step % config.eval_every == 0):
                row |= self._evaluate()
            seconds = time.perf_counter() - started  # with evaluations and saves
            row["seconds"] = seconds
            row["tokens_per_s"] = (row["tokens"] - tokens_before) / seconds
            if self.world.rank == 0:
                row["mfu"] = self._flops.mfu(row["step_s"] * self.world.size)
                row["memory_bytes"] = peak_memory(self.device)
                self.metrics.append(row)
            if self._tensorboard is not None:
                self._tensorboard.append(row)
            # The line comes before the checkpoint: a run killed in between writes it again, while
            # after a checkpoint without its line the line would be missing for good.
            due = config.save_every and self.step % config.save_every == 0
            if last or stopping or due:
                self.save()
            if self.world.rank == 0:
                self._on_step(row)
            if stopping:
                return "stopped"
        return "finished"

    def save(self) -> Path:
        """Write a checkpoint of the present step; returns its folder. Collective."""
        self._calibrate()
        state = TrainState(
            step=self.step,
            elapsed=self.elapsed,
            position=self.position,
            optimizer=self.optimizer.state_dict(),
            rng=rng_state(),
            settings=self._settings(),
        )
        return save_checkpoint(
            self.world, self.out, self.model, state, self.tokenizer, self.config.keep_checkpoints
        )

    # -- one step -------------------------------------------------------------------------------

    def _optimizer_step(self) -> StepMetrics:
        config, model = self.config, self.model
        rate = learning_rate(config, self.step, self.total_steps)
        set_learning_rate(self.optimizer, rate)
        balancing = balancing_strength(config, self.step)
        means = self.world.mean(self._accumulate_gradients(balancing))
        shares = means.pop("shares", None)
        norm = self.world.clip_grad_norm(model, config.clip or math.inf)
        try:
            self._spikes.check(self.step + 1, float(means["loss"]), float(norm))
        except MorError as error:  # of means over ranks: every rank has found it
            self.world.raise_on_rank0(error)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        depth_fractions = None
        if isinstance(model.router, TokenChoiceRouter):
            assert shares is not None
            depth_fractions = depth_fractions_of(model.config, shares.tolist())
            if model.config.balancing == "loss_free":
                # After the step: the bias answers to the shares that this step has measured.
                model.router.update_bias(shares, balancing)
        self.step += 1
        self.position += config.batch_size
        return {
            "step": self.step,
            "tokens": self.step * config.tokens_per_step,
            "lr": rate,
            "grad_norm": float(norm),
            "flops": self._flops.add_step(self.step - 1, depth_fractions),
            **{name: float(value) for name, value in means.items()},
        }

    def _accumulate_gradients(self, balancing: float) -> dict[str, Tensor]:
        """Forward and backward pass of each of this rank's micro-batches.

        Args:
            balancing: share of token choice's balancing loss that counts at this step.

        Returns:
            Means over the micro-batches: `loss`, the auxiliary losses by name, and with token
            choice `shares`, (R,) of tokens by recursion count 1..R.
        """
        config, model = self.config, self.model
        means: dict[str, Tensor] = {}
        options = {
            "capacities": capacities_at_step(model.config, config, self.step),
            "document_end": self._document_end,
        }
        numbers = self.world.micro_batches(config, self.position)
        for number in numbers:
            batch = self._batches.at(number).to(self.device)  # (B, T + 1)
            # A random router draws from the micro-batch's own seed, so its choices depend neither
            # on the number of ranks nor on where a run was resumed. Seeds are 63 bits.
            torch.manual_seed((config.seed * 2**32 + number) % 2**63)
            with self._parallel_model.micro_batch(last=number == numbers[-1]):
                with torch.autocast(
                    self.device.type, torch.bfloat16, enabled=config.precision == "bf16"
                ):
                    out = self._parallel_model(batch[:, :-1], batch[:, 1:], **options)
                assert out.loss is not None
                assert out.total_loss is not None
                total = out.total_loss
                if balancing < 1 and "balancing_loss" in out.aux_losses:
                    # The total holds all of it: take off what does not count yet.
                    excess = (1 - balancing) * model.config.balancing_coeff
                    total = total - excess * out.aux_losses["balancing_loss"]
                # Gradients add up over micro-batches of equal size, so each counts its share.
                (total / len(numbers)).backward()
            measured = {"loss": out.loss, **out.aux_losses}
            if isinstance(model.router, TokenChoiceRouter):
                measured["shares"] = model.router.fractions(out.recursion_counts.reshape(-1))
            for name, value in measured.items():
                means[name] = means.get(name, 0) + value.detach() / len(numbers)
        return means

    def _evaluate(self) -> StepMetrics:
        """The evaluation's numbers, on every rank; rank 0 computes them. Collective."""
        self._calibrate()
        full_model = self.world.full_model(self.model)
        result = self.world.on_rank0(evaluate, full_model, self._eval_batches, self._document_end)
        values = result.as_dict()
        values["eval_tokens"] = values.pop("tokens")  # `tokens` of a line are those trained on
        return values

    def _calibrate(self) -> None:
        """Fit expert choice's thresholds to the present weights, once per step. Collective."""
        if self._calibrated_step == self.step or not self._calibration_batches:
            return
        if isinstance(self.model.router, ExpertChoiceRouter):
            full_model = self.world.full_model(self.model)
            thresholds = self.world.on_rank0(
                calibrate, full_model, self._calibration_batches, self._document_end
            )
            self.model.set_thresholds(thresholds)
        self._calibrated_step = self.step

    # -- setting up -----------------------------------------------------------------------------

    def _open_folder(self) -> None:
        """Make the run's folder, or take up one again, and write the resolved config."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            # A killed run may have written lines after its last checkpoint.
            self.metrics.truncate_after(self.step)
            settings = dataclasses.asdict(self.config)
            write_file(self.out / "config.yaml", dump_yaml(settings).encode())
        except OSError as error:
            raise storage_error(self.out, error, CheckpointError) from error

    def _build_model(self, data: TrainingData, checkpoint: Path | None) -> MoRModel:
        """The model that the first step starts from."""
        config = self.config
        if checkpoint is not None:
            return load(checkpoint)
        source = None
        if config.init_from is not None:
            source = load(config.init_from, dtype=torch.float32)
            self._check_tokenizer(config.init_from)
        if source is not None and not config.model:
            model = source  # the same model goes on
            config.check_length(model.config)
        else:
            # What the data and the source say holds unless the config says something else.
            width = self.tokenizer.vocab_size if source is None else source.config.vocab_size
            values = {"eos_token_id": data.eos_id, "vocab_size": width, **config.model}
            built = dataclasses.replace(config, model=values).model_config()
            if source is None:
                model = MoRModel(built)
            else:
                model = init_from_vanilla(source, built, config.init, config.seed)
        if data.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"vocab_size={model.config.vocab_size} is less than the {data.vocab_size} "
                f"entries of the tokenizer in {config.corpora[0][0]}: raise it, or leave it out."
            )
        return model

    def _check_tokenizer(self, source: Path) -> None:
        """Raise ConfigError if a checkpoint's token ids mean something else than the data's."""
        file = resolve(source) / TOKENIZER_FILE
        if file.is_file() and Tokenizer.load(file).to_json() != self.tokenizer.to_json():
            raise ConfigError(
                f"init_from={source} has another tokenizer than the data in {self.config.data}: "
                f"build the data again with `mor data build --tokenizer {file}`."
            )

    def _settings(self) -> dict[str, Any]:
        """The config's fields that a resumed run must share, as JSON has them."""
        plain = json.loads(json.dumps(dataclasses.asdict(self.config), default=str))
        return {k: v for k, v in plain.items() if k not in CHANGEABLE_ON_RESUME}

    def _resume(self, checkpoint: Path) -> None:
        """Take over a checkpoint's state; the model has its weights already. Collective."""
        with self.world.all_or_none():
            state = read_matching_state(checkpoint, self._settings())
        # Apart: the shards are read together, so no rank may start that before all can.
        with self.world.all_or_none():
            optimizer = load_optimizer_state(self.world, checkpoint, state.optimizer)
        self.optimizer.load_state_dict(optimizer)
        set_rng_state(state.rng)
        self.step, self.elapsed, self.position = state.step, state.elapsed, state.position
