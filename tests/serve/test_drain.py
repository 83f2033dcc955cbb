"""SIGTERM under load loses no accepted request; sockets, options and a missing extra."""

import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer

NUM = 9
BODY = {"prompt": "the cat", "max_tokens": 160, "ignore_eos": True, "temperature": 0}


def test_a_server_that_is_told_to_stop_finishes_what_it_has(model: Path, tmp_path: Path) -> None:
    server = LiveServer(model, tmp_path / "log", "--max-num-seqs", "3", key=None)
    began = threading.Semaphore(0)

    def ask(number: int) -> list[Any]:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            body = {**BODY, "stream": True}
            if number % 3 == 0:  # not streamed: it has been accepted once it waits
                began.release()
                answer = client.post("/v1/completions", json=BODY)
                assert answer.status_code == 200, answer.text
                return answer.json()["choices"][0]["token_ids"]
            with client.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                began.release()
                lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
            assert lines[-1] == "data: [DONE]"
            chunks = [httpx.Response(200, text=line[6:]).json() for line in lines[:-1]]
            return [t for chunk in chunks for t in chunk["choices"][0]["token_ids"]]

    with ThreadPoolExecutor(NUM) as pool:
        asked = [pool.submit(ask, number) for number in range(NUM)]
        for _ in range(NUM):
            began.acquire(timeout=30)
        end = time.monotonic() + 60
        done, under_way = 0, 0
        while done + under_way < NUM:
            assert time.monotonic() < end
            time.sleep(0.01)
            done = int(server.metric("mor:request_success_total", finished_reason="length"))
            under_way = sum(server.get("/depths")[name] for name in ("running", "waiting"))
        server.process.send_signal(signal.SIGTERM)
        refused = False
        while not refused:
            refused = server.http.get("/health").status_code == 503
            assert time.monotonic() < end
        answer = server.post("/v1/completions", prompt="x")
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        tokens = [future.result(60) for future in asked]
    assert [len(each) for each in tokens] == [BODY["max_tokens"]] * NUM
    assert all(each == tokens[0] for each in tokens)
    server.http.close()
    assert server.process.wait(60) == 0, server.log
    stopped = re.search(r"stopping: (\d+) requests", server.log)
    assert stopped is not None
    assert 0 < int(stopped[1]) <= NUM - done
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(model: Path, tmp_path: Path) -> None:
    server = LiveServer(model, tmp_path / "log", "--max-num-seqs", "1", key=None)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body = {**BODY, "max_tokens": 250, "stream": True, "n": 8}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            assert server.stop(signal.SIGTERM) == 0
