"""Run tasks of lm-evaluation-harness (lm-eval): a `Scorer` behind lm-eval's model interface."""

import contextlib
import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mor.errors import ConfigError, DataError, MissingExtraError, RequestError, nearest
from mor.eval.scoring import LoglikelihoodRequest, Scorer
from mor.io.tokenizer import END_OF_TEXT, Tokenizer
from mor.model.config import MoRConfig
from mor.model.sampling import SamplingParams

_MAX_TOKENS = 256  # that a task generates if it does not say how many
_BOOTSTRAPS = 100  # for the standard error of what is not a mean


class HFStyleTokenizer:
    """Encodes text as `transformers` does: special tokens are recognized, and a BOS is put first
    where the tokenizer is so configured."""

    def __init__(
        self, tokenizer: Tokenizer, config: MoRConfig, prefix_id: int | None = None
    ) -> None:
        """Wrap a tokenizer.

        Args:
            config: of the model, for its special tokens.
            prefix_id: token before a text that has no context; None: the tokenizer's end of text,
                otherwise the model's BOS.

        Raises:
            ConfigError: the model has no token `prefix_id`.
        """
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        end = config.eos_token_id
        self.end_id = tokenizer.eos_id if end is None else end
        """The token that ends a text."""
        begin = self.end_id if config.bos_token_id is None else config.bos_token_id
        between_documents = self._backend.token_to_id(END_OF_TEXT)
        known = (prefix_id, between_documents, begin)
        self.prefix_id = next(token for token in known if token is not None)
        """The token before a text that has no context: preferably the one between documents in
        pre-training, since a chat model's BOS opens a message instead."""
        if not 0 <= self.prefix_id < config.vocab_size:
            raise ConfigError(
                f"prefix token {self.prefix_id} is outside 0..{config.vocab_size - 1}."
            )
        self._prefix = self._backend.decode([self.prefix_id], skip_special_tokens=False)

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Token ids of a text.

        Args:
            special: whether to add special tokens; None: unless the text begins with the prefix.
        """
        if special is None:
            special = not (self._prefix and text.startswith(self._prefix))
        return self._backend.encode(text, add_special_tokens=special).ids


def evaluate(
    scorer: Scorer,
    tokenizer: HFStyleTokenizer,
    tasks: Sequence[str],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> dict[str, dict[str, float | None]]:
    """Scores by task and metric, as `run_tasks` returns them, of a model behind a `Scorer`.

    Args:
        on_progress: called with (requests done, requests in all).
        **options: those of `run_tasks`.

    Raises:
        RequestError: an item does not fit the model, or the scorer cannot generate.
        ConfigError, MissingExtraError: as `run_tasks`.
    """
    return run_tasks(lambda: _model(scorer, tokenizer, on_progress), tasks, **options)


def run_tasks(
    model: Callable[[], Any],
    tasks: Sequence[str],
    *,
    include: Sequence[Path] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 1234,
) -> dict[str, dict[str, float | None]]:
    """Scores by task and metric; `<metric>_stderr` is the metric's standard error.

    Args:
        model: called once, returns a model of lm-eval.
        tasks: names of tasks or groups.
        include: folders of task files; a task in none of them is one of lm-eval's own, whose data
            it downloads.
        num_fewshot: examples before each item; None: the task's number.
        limit: items of each task; None: all.
        seed: of the choice of examples.

    Raises:
        ConfigError: no such task.
        MissingExtraError: the extra `eval` is not installed.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("lm-eval", "eval") from error
    folders: list[Path | str] = list(include)
    with _quiet():
        # lm-eval's own tasks are indexed only if one is asked for: that takes seconds.
        manager = TaskManager(include_path=folders or None, include_defaults=False)
        missing = [name for name in tasks if name not in manager.task_index]
        if missing:
            manager = TaskManager(include_path=folders or None)
            unknown = [name for name in missing if name not in manager.task_index]
            if unknown:
                hint = nearest(unknown[0], manager.task_index)
                raise ConfigError(f"task {unknown[0]!r} is unknown: {hint:.300}")
        found = simple_evaluate(
            model=model(),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            fewshot_random_seed=seed,
        )
    assert found is not None
    return {name: _scores(values) for name, values in found["results"].items()}


def _scores(values: Mapping[str, Any]) -> dict[str, float | None]:
    """A task's results by metric: "acc,none" as "acc", "acc,f" as "acc[f]"; None for no number."""
    scores: dict[str, float | None] = {}
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if not filtered:
            continue
        name = metric if filtered == "none" else f"{metric}[{filtered}]"
        if isinstance(value, (int, float)) and math.isfinite(value):
            scores[name] = float(value)
        else:
            scores[name] = None
    return scores


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Let lm-eval and datasets log errors only."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _model(
    scorer: Scorer, tokenizer: HFStyleTokenizer, on_progress: Callable[[int, int], None]
) -> Any:
    """A model of lm-eval that calls the scorer."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    # Defined in here because lm-eval, an extra, is imported in here.
    class Model(TemplateLM):
        """lm-eval's abstract methods, by way of the scorer and the tokenizer."""

        @property
        def eot_token_id(self) -> int:
            return tokenizer.end_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.prefix_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            return tokenizer.encode(string, add_special_tokens)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [
                LoglikelihoodRequest(tuple(context), tuple(after)) for _, context, after in requests
            ]
            return [tuple(score) for score in _score_distinct(scorer, pairs, on_progress)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            pairs: list[LoglikelihoodRequest] = []
            owners: list[int] = []
            for number, request in enumerate(requests):
                for window in get_rolling_token_windows(
                    token_list=tokenizer.encode(request.args[0]),
                    prefix_token=tokenizer.prefix_id,
                    max_seq_len=scorer.max_length - 1,
                    context_len=1,
                ):
                    context, after = make_disjoint_window(window)
                    # A long text is several windows; their sums belong to one request.
                    pairs.append(LoglikelihoodRequest(tuple(context), tuple(after)))
                    owners.append(number)
            totals = [0.0] * len(requests)
            for owner, score in zip(
                owners, _score_distinct(scorer, pairs, on_progress), strict=True
            ):
                totals[owner] += score.logprob
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            asked = [_request(tokenizer, scorer.max_length, *request.args) for request in requests]
            return scorer.generate([prompt for prompt, _ in asked], [params for _, params in asked])

    return Model()


def _score_distinct(
    scorer: Scorer, pairs: list[LoglikelihoodRequest], on_progress: Callable[[int, int], None]
) -> Any:
    """Scores of the pairs, equal pairs computed once; `on_progress` is told after each batch."""
    different = list(dict.fromkeys(pairs))
    finished = 0

    def done(count: int) -> None:
        nonlocal finished
        finished += count
        on_progress(finished, len(different))

    scores = dict(zip(different, scorer.score(different, done), strict=True))
    return [scores[pair] for pair in pairs]


def _request(
    tokenizer: HFStyleTokenizer, max_length: int, context: str, settings: Mapping[str, Any]
) -> tuple[list[int], SamplingParams]:
    """Prompt and params of a `generate_until` request, from its task's generation_kwargs."""
    until = settings.get("until") or []
    stop = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
    max_tokens = int(settings.get("max_gen_toks", _MAX_TOKENS))
    room = max_length + 1 - max_tokens
    if room < 1:
        raise RequestError(
            f"max_gen_toks={max_tokens} does not fit this model: {max_length} at most."
        )
    sampled = settings.get("do_sample", False)
    try:
        params = SamplingParams(
            max_tokens=max_tokens,
            stop=stop,
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(settings.get("top_p", 1.0)) if sampled else 1.0,
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"the task's generation_kwargs cannot be used: {error}") from error
    return tokenizer.encode(context)[-room:] or [tokenizer.prefix_id], params
