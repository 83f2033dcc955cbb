"""`mor eval`: the library's numbers, on the run's own corpus or on any text."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Mor, TinyRun, one_sentence

from mor import Tokenizer, load
from mor.data.batches import TokenShards, sequential_windows
from mor.train.evaluate import evaluate


def as_json(mor: Mor, *args: object) -> dict[str, Any]:
    called = mor("eval", *args, "--json")
    assert (called.status, called.err) == (0, "")
    (line,) = called.out.splitlines()
    return json.loads(line)


def test_a_run_is_evaluated_on_its_own_corpus(mor: Mor, tiny: TinyRun) -> None:
    shards = TokenShards.open(tiny.corpus, "valid")
    windows = list(sequential_windows(shards, 32))
    expected = evaluate(load(tiny.run), [torch.from_numpy(w)[None] for w in windows])

    found = as_json(mor, tiny.run)
    assert found["data"] == f"{tiny.corpus} (valid)"
    assert (found["windows"], found["sequence_length"]) == (len(windows), 32)
    assert found["tokens"] == 32 * len(windows) == expected.tokens
    for rule in ("topk", "threshold"):
        nll = getattr(expected, f"nll_{rule}")
        assert found[f"nll_{rule}"] == pytest.approx(nll, abs=1e-6)
        assert found[f"perplexity_{rule}"] == pytest.approx(math.exp(nll), rel=1e-5)
        bits = nll * found["tokens"] / math.log(2) / found["bytes"]
        assert found[f"bits_per_byte_{rule}"] == pytest.approx(bits, rel=1e-5)
    assert found["nll_gap"] == pytest.approx(expected.causal_gap, abs=1e-6)
    assert found["depth_histogram"] == pytest.approx(expected.depth_histogram)
    mean = sum(n * share for n, share in enumerate(expected.depth_histogram))
    assert found["mean_recursions"] == pytest.approx(mean)
    assert found["dead_share"] == expected.dead_share
    assert found["thresholds"] == list(load(tiny.run).config.thresholds or ())

    checkpoint = next((tiny.run / "checkpoints").glob("step-*6"))
    assert as_json(mor, checkpoint)["nll_topk"] == found["nll_topk"]
    named = as_json(mor, tiny.run, "--data", tiny.corpus, "--sequence-length", 32)
    assert named["nll_topk"] == found["nll_topk"]


def test_a_run_that_masks_documents_is_evaluated_so(
    mor: Mor, tiny: TinyRun, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ("--steps", 1, "--mask_documents", "true")
    assert mor("train", tiny.config, "--out", run, *options).status == 0
    shards = TokenShards.open(tiny.corpus, "valid")
    windows = [torch.from_numpy(w)[None] for w in sequential_windows(shards, 32)]
    masked = evaluate(load(run), windows, shards.eos_id).nll_threshold
    assert abs(masked - evaluate(load(run), windows).nll_threshold) > 1e-5
    found = as_json(mor, run, "--by-token", 1, "--calibrate", 2)
    assert found["windows"] == len(windows)
    assert as_json(mor, run)["nll_threshold"] == pytest.approx(masked, abs=1e-6)


def test_bytes_are_those_of_the_text(mor: Mor, tiny: TinyRun) -> None:
    file = tiny.text / "03.txt"
    text = file.read_text(encoding="utf-8")
    ids = Tokenizer.load(tiny.corpus).encode(text)
    found = as_json(mor, tiny.run, "--data", file, "--sequence-length", 1)
    assert found["tokens"] == len(ids)  # all but the first one, and the end of text
    first = Tokenizer.load(tiny.corpus).decode(ids[:1])
    assert found["bytes"] == len(text.encode()) - len(first.encode())


def test_text_is_the_corpus_it_would_make(mor: Mor, tiny: TinyRun, tmp_path: Path) -> None:
    args = ("data", "build", tiny.text, "--out", tmp_path / "corpus", "--tokenizer", tiny.corpus)
    assert mor(*args, "--valid-fraction", 0.5).status == 0
    built = as_json(mor, tiny.run, "--data", tmp_path / "corpus")

    tokenizer = Tokenizer.load(tiny.corpus)
    shards = TokenShards.open(tmp_path / "corpus", "valid")
    text = tokenizer.decode(shards.window(0, shards.num_tokens).tolist())
    lines = tmp_path / "valid.jsonl"
    documents = text.removesuffix("<|endoftext|>").split("<|endoftext|>")
    lines.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    same = as_json(mor, tiny.run, "--data", lines)
    assert len(documents) > 1
    for key in ("nll_topk", "nll_threshold", "tokens", "bytes", "windows"):
        assert same[key] == pytest.approx(built[key], rel=1e-9), key


def test_the_standard_library_is_text(mor: Mor, tiny: TinyRun) -> None:
    found = as_json(mor, tiny.run, "--data", "stdlib", "--max-windows", 2)
    assert (found["data"], found["windows"], found["tokens"]) == ("stdlib", 2, 64)


def test_fewer_and_shorter_windows(mor: Mor, tiny: TinyRun) -> None:
    found = as_json(mor, tiny.run, "--max-windows", 3, "--sequence-length", 16)
    assert (found["windows"], found["sequence_length"], found["tokens"]) == (3, 16, 48)
    short = as_json(mor, tiny.run, "--data", tiny.text / "00.txt", "--max-windows", 1)
    assert short["tokens"] == 32


def test_calibration_changes_thresholds_and_holds_its_text_back(mor: Mor, tiny: TinyRun) -> None:
    before = as_json(mor, tiny.run)
    after = as_json(mor, tiny.run, "--calibrate", 8)
    assert after["thresholds"] != before["thresholds"]
    assert after["windows"] == before["windows"]  # a corpus is calibrated on its train split
    assert after["nll_topk"] == before["nll_topk"]

    file = tiny.text / "00.txt"
    whole = as_json(mor, tiny.run, "--data", file)
    rest = as_json(mor, tiny.run, "--data", file, "--calibrate", 2)
    assert rest["windows"] == whole["windows"] - 2
    message = one_sentence(mor("eval", tiny.run, "--data", file, "--calibrate", 999), status=1)
    assert "--calibrate=999" in message


def test_what_people_read(mor: Mor, tiny: TinyRun) -> None:
    found = as_json(mor, tiny.run)
    status, out, err = mor("eval", tiny.run)
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert re.search(r"^ +topk +threshold +gap$", out, re.MULTILINE)
    nll = rf"^NLL, nats per token +{found['nll_topk']:.4f} +{found['nll_threshold']:.4f} +[+-]"
    assert re.search(nll, out, re.MULTILINE)
    assert re.search(rf"^1 +{found['depth_histogram'][1]:.1%}$", out, re.MULTILINE)
    assert f"mean recursions {found['mean_recursions']:.3f} of 2" in out
    assert f"router accuracy {found['router_accuracy']:.3f}" in out


def test_tokens_by_depth(mor: Mor, scattered: Path, tiny: TinyRun) -> None:
    args = (scattered, "--data", tiny.text, "--by-token", 4)
    found = as_json(mor, *args)["by_token"]
    assert [len(found[key]) for key in ("deepest", "shallowest")] == [4, 4]
    deep = [token["mean_recursions"] for token in found["deepest"]]
    shallow = [token["mean_recursions"] for token in found["shallowest"]]
    assert deep == sorted(deep, reverse=True)
    assert shallow == sorted(shallow)
    assert min(deep) > max(shallow)
    assert all(t["occurrences"] >= found["min_occurrences"] for t in found["deepest"])
    out = mor("eval", *args).out
    for token in found["deepest"] + found["shallowest"]:
        numbers = f"{token['mean_recursions']:.3f} +{token['occurrences']:,}"
        pattern = rf"^{re.escape(repr(token['piece']))} +{token['token_id']} +{numbers}$"
        assert re.search(pattern, out, re.MULTILINE)


def test_a_vanilla_model_has_one_depth(mor: Mor, zero_head: Path, tiny: TinyRun) -> None:
    found = as_json(mor, zero_head, "--data", tiny.text)
    assert found["depth_histogram"] == [0, 1]
    assert found["router_accuracy"] is found["dead_share"] is found["thresholds"] is None
    assert found["nll_gap"] == 0
    vocab_size = load(zero_head).config.vocab_size
    assert found["nll_topk"] == pytest.approx(math.log(vocab_size), rel=1e-5)
    assert "router accuracy" not in mor("eval", zero_head, "--data", tiny.text).out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "no-such-text.txt"], ["no-such-text.txt"]),
        (["--data", "README.md", "--sequence-length", 65], ["sequence_length=65", "64"]),
        (["--sequence-length", 0], ["--sequence-length=0"]),
        (["--max-windows", 0], ["--max-windows=0"]),
        (["--calibrate", -1], ["--calibrate=-1"]),
        (["--by-token", -2], ["--by-token=-2"]),
        (["--device", "gpu"], ["'gpu'"]),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    mor: Mor, tiny: TinyRun, options: list[object], words: list[str]
) -> None:
    message = one_sentence(mor("eval", tiny.run, *options), status=1)
    assert all(word in message for word in words)


def test_a_model_without_a_run_needs_text(mor: Mor, zero_head: Path, tiny: TinyRun) -> None:
    assert "--data" in one_sentence(mor("eval", zero_head), status=1)
    called = mor("eval", zero_head, "--data", tiny.text, "--calibrate", 2)
    assert "expert_choice" in one_sentence(called, status=1)


@pytest.mark.parametrize(("vocab_size", "word"), [(260, "another tokenizer"), (500, "500")])
def test_a_corpus_of_another_tokenizer_is_refused(
    mor: Mor, tiny: TinyRun, tmp_path: Path, vocab_size: int, word: str
) -> None:
    text, out = tmp_path / "text.jsonl", tmp_path / "corpus"
    words = [" ".join(f"w{i * 7919 % 1000:03}" * 2 for i in range(n, n + 300)) for n in range(9)]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in words))
    assert mor("data", "build", text, "--out", out, "--train-tokenizer", vocab_size).status == 0
    message = one_sentence(mor("eval", tiny.run, "--data", out), status=1)
    assert word in message
    assert str(out) in message
