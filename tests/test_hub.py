"""Models with a name on the hub: fetched once per node, then a folder like any other."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from dist_sft import hub
from dist_sft.config import Model
from dist_sft.errors import UserError


def test_names_on_the_hub_become_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, Any]] = []

    def snapshot(name: str, *, revision: str | None, **patterns: Any) -> str:
        asked.append((name, revision))
        assert "*.json" in patterns["allow_patterns"]
        assert ("*.safetensors" in patterns["allow_patterns"]) == (name == "org/model")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    said: list[str] = []

    located = hub.on_disk(
        Model(path="org/model", tokenizer="org/words", revision="v1"), said.append
    )

    assert asked == [("org/model", "v1"), ("org/words", None)]
    assert located.path == str(tmp_path / "org/model")
    assert located.tokenizer == str(tmp_path / "org/words")
    assert located.revision is None
    assert said[:2] == [
        "model.path: there is no folder org/model here, so it is looked for on the hub",
        f"model.path: org/model is in {tmp_path / 'org/model'}",
    ]


def test_folders_stay_what_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (str(folder), "./not/there"):  # what is missing is for whoever loads it to say
        assert hub.on_disk(Model(path=path), print).path == path


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.revision: got v1, but .* is a folder here"):
        hub.on_disk(Model(path=str(tmp_path), revision="v1"), print)


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("offline mode is enabled\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(UserError) as raised:
        hub.on_disk(Model(path="models/smollm"), lambda _: None)
    assert str(raised.value) == (
        "model.path: models/smollm: there is no such folder here, and the hub does not give it: "
        "offline mode is enabled"
    )


def test_identity_follows_config_and_weights(tmp_path: Path) -> None:
    seen = set()
    for config, size in (("{}", 1), ("{ }", 1), ("{}", 2)):
        (tmp_path / "config.json").write_text(config)
        (tmp_path / "model.safetensors").write_bytes(b"x" * size)
        seen.add(hub.identity(tmp_path))
        assert hub.identity(tmp_path) in seen
    assert len(seen) == 3
