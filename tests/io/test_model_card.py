"""Model cards, and uploading to a hub that is not there."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import mor
from mor.errors import CheckpointError
from mor.io.hub import push_to_hub
from mor.io.model_card import model_card, write_card
from tiny import tiny_config, tiny_model

hub = pytest.importorskip("huggingface_hub")


def test_a_card_has_numbers_commands_and_depths() -> None:
    text = model_card(
        tiny_config("expert"),
        name="small",
        commands=("mor train a.yaml --out small",),
        base_model="owner/base",
        numbers={"steps": 12_000, "NLL": 3.25, "note": "text"},
        depth_shares=(0.0, 0.5, 0.25, 0.25),
    )
    _, meta, body = text.split("---\n", 2)
    values = yaml.safe_load(meta)
    assert values["base_model"] == "owner/base"
    assert values["tags"] == ["mixture-of-recursions"]
    assert body.startswith("\n# small\n")
    assert "mor train a.yaml --out small\n" in body
    assert "| steps | 12,000 |" in body
    assert "| NLL | 3.2500 |" in body
    assert "1  50.0% " + "#" * 20 + "\n" in body
    assert "expert choice routing" in body
    assert "\n0 " not in body


@pytest.mark.parametrize(("kind", "what"), [("vanilla", "plain"), ("recursive", "passes the")])
def test_a_card_says_what_the_model_is(kind: str, what: str) -> None:
    text = model_card(tiny_config(kind), name="x")
    assert what in text
    assert "## Numbers" not in text


class Hub:
    """Stands in for HfApi and notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, token: str | None = None) -> "Hub":
        self.calls.append(("api", {"token": token}))
        return self

    def create_repo(self, repository: str, **options: Any) -> None:
        if repository == "not/mine":
            raise ValueError("403 Forbidden")
        self.calls.append(("create_repo", {"repository": repository, **options}))

    def upload_file(self, **options: Any) -> None:
        self.calls.append(("upload_file", options))

    def upload_folder(self, **options: Any) -> Any:
        self.calls.append(("upload_folder", options))
        return type("Commit", (), {"commit_url": "https://hub/commit/1"})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setattr(hub, "HfApi", fake)
    return fake


def test_push_uploads_the_model_and_not_the_trainers_state(api: Hub, tmp_path: Path) -> None:
    mor.save(tiny_model("expert"), tmp_path / "model")
    (tmp_path / "model" / "training_state.pt").write_bytes(b"large")
    address = push_to_hub(tmp_path / "model", "me/small", private=True, token="t")
    assert address == "https://hub/commit/1"
    assert [name for name, _ in api.calls] == ["api", "create_repo", "upload_file", "upload_folder"]
    options = dict(api.calls)
    assert options["api"] == {"token": "t"}
    assert options["create_repo"] == {"repository": "me/small", "private": True, "exist_ok": True}
    assert b"# small" in options["upload_file"]["path_or_fileobj"]
    patterns = options["upload_folder"]["allow_patterns"]
    uploaded = hub.utils.filter_repo_objects(
        [p.name for p in (tmp_path / "model").iterdir()], allow_patterns=patterns
    )
    assert sorted(uploaded) == ["config.json", "generation_config.json", "model.safetensors"]


def test_an_own_card_is_kept(api: Hub, tmp_path: Path) -> None:
    mor.save(tiny_model("expert"), tmp_path / "model")
    write_card(tmp_path / "model", "# mine\n")
    push_to_hub(tmp_path / "model", "me/small")
    assert "upload_file" not in dict(api.calls)


def test_what_cannot_be_pushed(api: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        push_to_hub(tmp_path / "none", "me/small")
    mor.save(tiny_model("expert"), tmp_path / "model")
    with pytest.raises(CheckpointError, match="not/mine: the hub did not take it: 403"):
        push_to_hub(tmp_path / "model", "not/mine")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not complete"):
        push_to_hub(tmp_path / "model", "me/small")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_card(tmp_path / "nowhere", "text")
