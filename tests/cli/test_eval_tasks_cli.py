"""`mor eval --tasks`: the table, the record, and options that do not go together."""

import json
from pathlib import Path

import pytest
from cli_helpers import Mor, TinyRun, one_sentence

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")  # of lm-eval, datasets and what they import


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    items = [{"good": f"def {i}", "bad": f"return {i} import"} for i in range(9)]
    (folder / "blimp.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def test_table_record_and_kept_tasks(mor: Mor, tiny: TinyRun, sets: Path, tmp_path: Path) -> None:
    call = ("eval", tiny.run, "--tasks", "blimp", "--data", sets, "--limit", 6)
    files = ("--output", tmp_path / "found.json", "--keep-tasks", tmp_path / "tasks")
    called = mor(*call, *files)
    assert called.status == 0, called.err
    assert "blimp" in called.out
    record = json.loads((tmp_path / "found.json").read_text())
    assert 0 <= record["tasks"]["blimp"]["acc"] <= 1
    assert record["versions"]["lm_eval"]
    assert (record["limit"], record["selection"]) == (6, "threshold")
    assert {"command", "commit", "seconds", "torch"} <= set(record)
    assert (tmp_path / "tasks" / "blimp.yaml").is_file()
    topk = mor(*call, "--json", "--selection", "topk")
    assert json.loads(topk.out.splitlines()[-1])["selection"] == "topk"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", 5), "--limit needs --tasks"),
        (("--selection", "topk"), "--selection needs --tasks"),
        (("--tasks", "blimp", "--calibrate", 3), "--calibrate does not go with --tasks"),
        (("--tasks", "blimp", "--limit", 0), "--limit=0 must be at least 1"),
        (("--tasks", "blimp", "--selection", "top"), "did you mean 'topk'"),
        (("--tasks", "blimp", "--selection", "topk", "--dtype", "bfloat16"), "--dtype is the eng"),
        (("--tasks", ","), "names no task"),
        (("--tasks", "blimp", "--data", "nowhere"), "has no blimp.jsonl"),
        (("--tasks", "blimp", "--include-path", "nowhere"), "is no folder"),
    ],
)
def test_what_cannot_work(
    mor: Mor, tiny: TinyRun, options: tuple[str | int, ...], message: str
) -> None:
    assert message in one_sentence(mor("eval", tiny.run, *options), 1)
