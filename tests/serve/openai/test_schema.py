"""The server against its own OpenAPI document: no 5xx, no answer that it does not know of."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from live_server import KEY, LiveServer
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def small(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server whose requests are short, whatever they ask for."""
    log = tmp_path_factory.mktemp("schema") / "log"
    limits = ("--max-model-len", "24", "--max-num-seqs", "8", "--max-waiting", "4")
    running = LiveServer(model, log, *limits)
    yield running
    assert running.stop() == 0, running.log
    assert "Traceback" not in running.log


def fuzz(server: LiveServer, num: int) -> int:
    """So many bodies and parameters that fit the document, and as many that do not, for every
    operation; how many were sent."""
    document = schemathesis.openapi.from_dict(server.get("/openapi.json"))
    sent = 0
    for result in document.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:

            @settings(max_examples=num, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(mode))
            def run(case: Any) -> None:
                nonlocal sent
                sent += 1
                answer = case.call_and_validate(server.url, headers=HEADERS, checks=CHECKS)
                assert answer.status_code < 500

            try:
                run()
            except Unsatisfiable:  # nothing is wrong for a route that takes nothing
                assert mode is GenerationMode.NEGATIVE, operation.label
    return sent


def test_a_few_cases_of_every_operation(small: LiveServer) -> None:
    assert fuzz(small, 8) > 70


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_cases_of_every_operation(small: LiveServer) -> None:
    assert fuzz(small, 330) > 2500
