"""`mor bench serve`: arrivals, prompts, numbers that follow from times, and the command."""

import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_server import Fake, serving
from mor import Tokenizer, save
from mor.bench.serve import (
    ArrivalProcess,
    BenchRequest,
    RawResponse,
    completion_bodies,
    file_requests,
    parse_response,
    random_requests,
    summarize,
)
from mor.bench.serve_offline import serving as serving_model
from mor.cli.main import main
from mor.errors import ConfigError, DataError, RequestError
from tiny import tiny_model


def event(**choice: Any) -> bytes:
    return json.dumps({"choices": [choice] if choice else []}).encode()


def response(times: list[float], start: float = 10.0) -> RawResponse:
    """A request whose tokens came at these seconds after its start."""
    events = [event(text="a", token_ids=[1], recursion_counts=[1 + i % 2]) for i in indices(times)]
    usage = {"prompt_tokens": 7, "completion_tokens": len(times)}
    last = json.dumps({"choices": [], "usage": usage}).encode()
    arrivals = [start + t for t in times]
    return RawResponse(start=start, times=[*arrivals, start + 99], events=[*events, last])


def indices(times: list[float]) -> range:
    return range(len(times))


# -- arrivals and prompts ---------------------------------------------------------------------


def test_all_at_once_by_default() -> None:
    assert ArrivalProcess().delays(3) == [0, 0, 0]


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 50.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    delays = ArrivalProcess(request_rate=4, burstiness=burstiness, seed=1).delays(4000)
    gaps = [b - a for a, b in itertools.pairwise(delays)]
    assert delays[0] == 0
    assert delays == sorted(delays)
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.15)
    # a gamma distribution's spread relative to its mean is 1 / sqrt(shape)
    spread = statistics.stdev(gaps) / statistics.mean(gaps)
    assert spread == pytest.approx(burstiness**-0.5, rel=0.15)


@pytest.mark.parametrize("values", [{"request_rate": 0}, {"burstiness": 0}, {"max_concurrency": 0}])
def test_arrivals_that_cannot_be(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"^--(request-rate|burstiness|max-concurrency)="):
        ArrivalProcess(**values)


def test_random_prompts_stay_in_the_vocabulary_and_in_their_lengths() -> None:
    requests = random_requests(200, input_len=10, output_len=20, vocab_size=5, spread=0.5, seed=3)
    assert {t for request in requests for t in request.prompt} == set(range(5))
    assert {len(request.prompt) for request in requests} == set(range(5, 16))
    assert {request.max_tokens for request in requests} == set(range(10, 31))
    assert requests == random_requests(
        200, input_len=10, output_len=20, vocab_size=5, spread=0.5, seed=3
    )


def test_prompts_from_a_file_repeat_if_they_must(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "output_tokens": 3}\n')
    requests = file_requests(path, 4, output_len=9, seed=0)
    assert sorted(requests, key=lambda a: a.max_tokens) == [
        *([BenchRequest(prompt="b", max_tokens=3)] * 2),
        *([BenchRequest(prompt="a", max_tokens=9)] * 2),
    ]
    assert requests[:2] == requests[2:]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"text": "a"}', '{"prompt": "a", "output_tokens": 0}'],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(DataError, match=r"prompts\.jsonl, line 2"):
        file_requests(path, 4, output_len=9, seed=0)


# -- numbers ----------------------------------------------------------------------------------


def test_an_answer_is_read_from_times_and_events() -> None:
    result = parse_response(response([0.5, 0.6, 0.9]))
    assert result.ttft == pytest.approx(0.5)
    assert result.e2el == pytest.approx(0.9)  # not the time of the usage, 99
    assert result.itl == pytest.approx([0.1, 0.3])
    assert result.tpot == pytest.approx(0.2)
    assert (result.prompt_tokens, result.output_tokens) == (7, 3)
    assert result.recursions == [1, 2, 1]


def test_a_summary_has_rates_percentiles_and_goodput() -> None:
    quick, slow = response([0.1, 0.2, 0.3]), response([1.0, 3.0])
    failed = RawResponse(error="no room.")
    goodput = {"ttft": 500.0, "tpot": 150.0}
    found = summarize([quick, slow, failed], 4.0, percentiles=[50, 100], goodput=goodput)
    assert (found["completed"], found["failed"], found["errors"]) == (2, 1, ["no room."])
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (14, 5)
    assert found["request_throughput"] == 0.5
    assert found["request_goodput"] == 0.25
    assert found["output_throughput"] == 1.25
    assert found["mean_recursions"] == pytest.approx(7 / 5)
    assert found["mean_ttft_ms"] == pytest.approx(550)
    assert found["median_itl_ms"] == found["p50_itl_ms"] == pytest.approx(100)
    assert found["p100_itl_ms"] == pytest.approx(2000)
    assert found["mean_tpot_ms"] == pytest.approx((100 + 2000) / 2)
    assert found["p100_e2el_ms"] == pytest.approx(3000)


def test_a_single_token_has_no_time_per_output_token() -> None:
    found = summarize([response([0.1])], 1.0)
    assert found["mean_tpot_ms"] is None
    assert found["p99_itl_ms"] is None
    assert found["request_goodput"] is None


@pytest.mark.parametrize(
    "bad",
    [
        RawResponse(error="gone."),
        RawResponse(),
        RawResponse(times=[1.0], events=[b'{"error": "gone."}']),
    ],
)
def test_no_answer_at_all_is_an_error(bad: RawResponse) -> None:
    with pytest.raises(RequestError, match=r"none of 1 requests came through: (gone|the server)"):
        summarize([bad], 1.0)


def test_requests_carry_the_options() -> None:
    (body,) = completion_bodies(
        [BenchRequest(prompt=[1, 2], max_tokens=3)], "m", {"ignore_eos": True}
    )
    assert body["prompt"] == [1, 2]
    assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("m", 3, True)
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}


# -- the command ------------------------------------------------------------------------------

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Call:
    """Call `mor bench serve`; status, stdout, stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        try:
            status = main(["bench", "serve", *map(str, args)])
        except SystemExit as leave:
            status = int(leave.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


SHORT = ("--num-prompts", 12, "--random-input-len", 4, "--random-output-len", 5)


def test_the_command_prints_a_table_and_a_line(bench: Call, tmp_path: Path) -> None:
    with serving(Fake(delay_s=0.002)) as fake:
        options = ("--max-concurrency", 3, "--ignore-eos", "--max-recursions", 2)
        saved = ("--save-result", "--result-dir", tmp_path / "new", "--result-filename", "r.json")
        status, out, err = bench("--port", fake.port, *SHORT, *options, *saved, "--seed", 5)
    assert status == 0, err
    *table, line = out.splitlines()
    record = json.loads(line)
    assert record["completed"] == record["num_prompts"] == 12
    assert record["total_output_tokens"] == 60
    assert record["total_input_tokens"] == 48
    assert record["mean_recursions"] == pytest.approx((1 + 2 + 2 + 1 + 2) / 5)
    assert record["p99_itl_ms"] >= record["median_itl_ms"] > 0
    assert record["mean_e2el_ms"] > record["mean_ttft_ms"] > 0
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == record
    assert any(row.startswith("time to first token") for row in table)
    assert len(fake.asked) == 13  # one to see that the server answers
    assert 2 <= fake.max_at_once <= 3
    for path, body in fake.asked:
        assert path == "/v1/completions"
        assert (body["max_recursions"], body["ignore_eos"], body["seed"]) == (2, True, 5)
        assert body["model"] == "fake"
        assert all(0 <= token < 50 for token in body["prompt"])


def test_prompts_of_a_file_and_goodput(bench: Call, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Once upon"}\n')
    files = ("--dataset-name", "custom", "--dataset-path", path, "--custom-output-len", 2)
    with serving(Fake()) as fake:
        rates = ("--request-rate", 500, "--goodput", "ttft:60000", "e2el:60000")
        status, out, _ = bench("--base-url", f"{fake.url}/v1", "--num-prompts", 3, *files, *rates,
                               "--json")  # fmt: skip
    assert status == 0
    record = json.loads(out)
    assert record["request_goodput"] == record["request_throughput"] > 0
    assert record["request_rate"] == 500
    assert {body["prompt"] for _, body in fake.asked} == {"Once upon"}


def test_failures_are_told(bench: Call) -> None:
    with serving(Fake(refuse=(429, "full."))) as fake:
        status, out, err = bench("--port", fake.port, *SHORT)
    assert (status, out) == (1, "")
    assert "answers 429: full." in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--goodput", "ttf:5"), "did you mean 'ttft'?"),
        (("--goodput", "ttft"), "a metric and milliseconds"),
        (("--metric-percentiles", "50,101"), "numbers from 0 to 100"),
        (("--percentile-metrics", "ttft,tpo"), "did you mean 'tpot'?"),
        (("--request-rate", "-1"), "must be above 0"),
        (("--dataset-name", "sharegpt"), "is unknown"),
        (("--dataset-name", "custom"), "needs --dataset-path"),
        (("--dataset-path", "x"), "needs --dataset-name custom"),
        (("--model", "fak"), "did you mean 'fake'?"),
        (("--num-prompts", "0"), "start at 1"),
        (("--random-range-ratio", "1"), "must be in [0, 1)"),
        (("--base-url", "nowhere"), "is no address"),
    ],
)
def test_what_is_wrong_is_one_sentence(bench: Call, options: tuple[str, str], message: str) -> None:
    with serving(Fake()) as fake:
        status, out, err = bench("--port", fake.port, *options)
    assert (status, out) == (1, "")
    assert message in " ".join(err.split())
    assert not fake.asked


def test_a_server_that_hides_its_vocabulary(bench: Call) -> None:
    with serving(Fake(vocab_size=None)) as fake:
        status, _, err = bench("--port", fake.port)
    assert status == 1
    assert "give --tokenizer" in err


def test_an_infinite_rate_is_json(bench: Call) -> None:
    with serving(Fake()) as fake:
        _, out, _ = bench("--port", fake.port, "--json", *SHORT)
    record = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["request_rate"] == "inf"
    assert math.isfinite(record["duration"])


# -- against the engine alone -----------------------------------------------------------------


@pytest.mark.slow
def test_http_against_the_engine(bench: Call, tmp_path: Path) -> None:
    save(tiny_model("expert", vocab_size=300), tmp_path / "m", Tokenizer.train(["a b c"], 300))
    sizes = ("--random-input-len", 8, "--random-output-len", 6, "--max-concurrency", 3)
    options = ("--against", "offline", "--rounds", 2, "--dtype", "float64", *sizes)
    status, out, err = bench(tmp_path / "m", *options)
    assert status == 0, err
    *table, line = out.splitlines()
    record = json.loads(line)
    assert record["same_texts"] == 1
    assert (record["streams"], record["load"]["rounds"]) == (3, 2)
    ratio = record["load"]["ratio"]
    assert record["http_cost"] == pytest.approx(1 - 1 / ratio)
    assert record["ttft_ms"] > 0
    assert record["ttft_ratio_min"] <= record["ttft_ratio"] <= record["ttft_ratio_max"]
    assert any(row.startswith("tokens/s, 3 streams") for row in table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--against", "offlin"), "did you mean 'offline'?"),
        (("--against=offline", "--max-concurrency", "0"), "--max-concurrency=0 must be at least 1"),
        (("--against=offline", "--goodput", "ttft:1"), "unknown option --goodput"),
    ],
)
def test_a_comparison_that_cannot_be(
    bench: Call, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    save(tiny_model("vanilla"), tmp_path / "m")
    status, out, err = bench(tmp_path / "m", *options)
    assert (status != 0, out) == (True, "")
    assert message in " ".join(err.split())


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"does not start: .*nowhere"):
        serving_model(tmp_path / "nowhere", []).__enter__()
