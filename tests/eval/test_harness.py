"""Tasks of lm-eval: the scores of a ten-line script, and of lm-eval's own `hf` model."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import mor
from mor.errors import ConfigError, DataError
from mor.eval.harness import HFStyleTokenizer, evaluate
from mor.eval.local_tasks import TASKS, read_set, write_tasks
from mor.eval.scoring import EngineScorer, TopkScorer
from mor.io.llama import from_llama
from mor.io.tokenizer import Tokenizer
from mor.model.transformer import MoRModel

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")  # of lm-eval, datasets and what they import

TEXT = "the cat sat on a mat and saw two dogs run to some old red house near this hill"
WORDS = TEXT.split()


def sentence(draw: random.Random, minimum: int = 3, maximum: int = 9) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(minimum, maximum)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of every kind, with the fields of the real ones."""
    folder, draw = tmp_path_factory.mktemp("sets"), random.Random(0)
    sets: dict[str, list[dict[str, Any]]] = {name: [] for name in FILES}
    for _ in range(12):
        choices = [sentence(draw) for _ in range(4)]
        item = {"query": sentence(draw, 20, 30), "choices": choices, "gold": draw.randrange(4)}
        for name in ("hellaswag", "arc_easy", "arc_challenge", "openbookqa", "piqa", "mmlu_test"):
            sets[name].append(item)
        sets["blimp"].append({"good": sentence(draw), "bad": sentence(draw)})
        contexts = [sentence(draw), sentence(draw)]
        pair = {"contexts": contexts, "continuation": sentence(draw), "gold": draw.randrange(2)}
        sets["winogrande"].append(item | pair)
        sets["lambada_openai"].append({"context": sentence(draw), "target": draw.choice(WORDS)})
        question = {"question": sentence(draw), "answer": f"{sentence(draw)}\n#### 7", "final": "7"}
        sets["gsm8k_test"].append(question)
        sets["gsm8k_train"].append(question)
    for name, items in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


FILES = (
    *("hellaswag", "arc_easy", "arc_challenge", "openbookqa", "piqa", "mmlu_test", "blimp"),
    *("winogrande", "lambada_openai", "gsm8k_test", "gsm8k_train"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 3], 300)


def model_of(tokenizer: Tokenizer, **fields: Any) -> MoRModel:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "max_position_embeddings": 400,
        "num_block_layers": 1,
        "initializer_range": 0.3,
        "vocab_size": tokenizer.vocab_size,
    }
    return MoRModel(mor.MoRConfig(**{**shape, **fields})).double().eval()


def scores_of(
    tasks: tuple[str, ...],
    data: Path,
    folder: Path,
    scorer: Any,
    words: HFStyleTokenizer,
    **options: Any,
) -> dict[str, dict[str, float | None]]:
    write_tasks(tasks, data, folder)
    return evaluate(scorer, words, tasks, include=[folder], **options)


def engine(model: MoRModel, tokenizer: Tokenizer) -> EngineScorer:
    config = mor.EngineConfig(kv_cache_memory_bytes=2**24)
    return EngineScorer(mor.LLM(model, config, tokenizer=tokenizer))


def test_scores_are_those_of_a_ten_line_script(
    data: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = model_of(tokenizer, num_recursions=3)
    tasks = ("blimp", "hellaswag", "winogrande", "lambada")
    found = scores_of(
        tasks,
        data,
        tmp_path / "tasks",
        engine(model, tokenizer),
        HFStyleTokenizer(tokenizer, model.config),
    )

    def logprobs(context: str, text: str) -> torch.Tensor:
        before = tokenizer.encode(context) or [tokenizer.eos_id]
        ids = torch.tensor(
            [[*before, *tokenizer.encode(context + text)[len(before) if context else 0 :]]]
        )
        with torch.no_grad():
            out = model(ids[:, :-1]).logits[0].log_softmax(-1)
        out, ids = out[len(before) - 1 :], ids[0, len(before) :]
        return out.gather(1, ids[:, None])[:, 0] - (out.argmax(-1) != ids).double() * 1e6

    def likelihood(context: str, text: str) -> float:
        return float((logprobs(context, text) % -1e6).sum())

    def best(values: list[float]) -> int:
        return max(range(len(values)), key=values.__getitem__)

    items = {name: list(read_set(data, name)) for name in FILES}
    right = {
        ("blimp", "acc"): [
            likelihood("", i["good"]) > likelihood("", i["bad"]) for i in items["blimp"]
        ],
        ("hellaswag", "acc"): [
            best([likelihood(i["query"], f" {c}") for c in i["choices"]]) == i["gold"]
            for i in items["hellaswag"]
        ],
        ("hellaswag", "acc_norm"): [
            best([likelihood(i["query"], f" {c}") / len(c) for c in i["choices"]]) == i["gold"]
            for i in items["hellaswag"]
        ],
        ("winogrande", "acc"): [
            best([likelihood(c, f" {i['continuation']}") for c in i["contexts"]]) == i["gold"]
            for i in items["winogrande"]
        ],
        ("lambada", "acc"): [
            bool((logprobs(i["context"], f" {i['target']}") > -1e5).all())
            for i in items["lambada_openai"]
        ],
    }
    for (task, metric), hits in right.items():
        assert found[task][metric] == pytest.approx(sum(hits) / len(hits)), (task, metric)
    assert found["blimp"]["acc_stderr"] is not None
    assert found["lambada"]["perplexity"] is not None


@pytest.mark.slow
def test_every_set_makes_a_task_and_examples_come_before_items(
    data: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = model_of(tokenizer, num_recursions=2)
    scorer, words = engine(model, tokenizer), HFStyleTokenizer(tokenizer, model.config)
    seen: list[int] = []
    found = scores_of(
        tuple(TASKS),
        data,
        tmp_path,
        scorer,
        words,
        limit=1,
        num_fewshot=1,
        on_progress=lambda done, total: seen.append(done),
    )
    assert set(found) == set(TASKS)
    assert found["gsm8k"]["exact_match[strict-match]"] is not None
    assert seen
    with pytest.raises(ConfigError, match="did you mean 'blimp'"):
        evaluate(scorer, words, ["blimpp"], include=[tmp_path])


def test_topk_sees_the_whole_sequence(data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of(tokenizer, num_recursions=3)
    words = HFStyleTokenizer(tokenizer, model.config)
    found = scores_of(("lambada",), data, tmp_path, TopkScorer(model), words)
    causal = scores_of(("lambada",), data, tmp_path, engine(model, tokenizer), words)
    assert found["lambada"]["perplexity"] != pytest.approx(causal["lambada"]["perplexity"])


def test_scores_are_those_of_lm_evals_own_model(
    data: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save(tmp_path / "llama")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps(names))
    tasks = ("blimp", "hellaswag", "winogrande", "lambada")
    model = from_llama(tmp_path / "llama")
    words = HFStyleTokenizer(tokenizer, model.config)
    ours = scores_of(tasks, data, tmp_path / "tasks", engine(model, tokenizer), words)
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "llama"), "device": "cpu"},
        tasks=list(tasks),
        batch_size=8,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )
    assert theirs is not None
    for task in tasks:
        for metric in ("acc", "acc_norm", "perplexity"):
            if f"{metric},none" in theirs["results"][task]:
                wanted = theirs["results"][task][f"{metric},none"]
                assert ours[task][metric] == pytest.approx(wanted, rel=1e-4), (task, metric)


def test_sets_that_are_missing_or_damaged_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no piqa"):
        write_tasks(["piqa"], tmp_path, tmp_path / "tasks")
    (tmp_path / "piqa.jsonl").write_text('{"query": 1}\n[1]\n')
    with pytest.raises(DataError, match=r"piqa.jsonl line 2: must hold a JSON object"):
        list(read_set(tmp_path, "piqa"))
    (tmp_path / "piqa.jsonl").write_text("{")
    with pytest.raises(DataError, match="line 1: not JSON"):
        list(read_set(tmp_path, "piqa"))
    (tmp_path / "piqa.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no items"):
        list(read_set(tmp_path, "piqa"))


def test_compressed_sets_are_read(data: Path, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.ZstdCompressor().compress((data / "blimp.jsonl").read_bytes())
    (tmp_path / "blimp.jsonl.zst").write_bytes(packed)
    assert list(read_set(tmp_path, "blimp")) == list(read_set(data, "blimp"))
    (tmp_path / "blimp.jsonl.zst").write_bytes(b"no frame at all")
    with pytest.raises(DataError, match="is damaged"):
        list(read_set(tmp_path, "blimp"))
