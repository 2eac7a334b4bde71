"""Hub ids, against a small server in the place of the hub: what is downloaded, and of which revision."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import save
from tiny_tokenizers import save_tokenizer

import tide_jax
import tide_jax.cli.main
from convert import convert, open_config, open_model, open_tokenizer
from tide_jax.errors import TideError

REPOSITORY = "org/model"
REVISIONS = {"main": "a" * 40, "v1.0": "b" * 40, "refs/pr/2": "c" * 40}
WEIGHTS = "model.safetensors"


class Hub:
    """Serves the same files under each revision, but for tokenizer_config.json, and keeps what was asked for."""

    def __init__(self, directory: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in directory.iterdir()}
        self.asked: list[str] = []

    def content(self, commit: str, name: str) -> bytes | None:
        if name == "tokenizer_config.json":
            return json.dumps({"model_max_length": 100 + list(REVISIONS.values()).index(commit)}).encode()
        return self.files.get(name)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        path = path.split("?")[0].replace("%2F", "/").lstrip("/")
        if path.startswith(f"api/models/{REPOSITORY}/tree/"):
            commit = path.rsplit("/", 1)[1]
            names = [*self.files, "tokenizer_config.json"]
            tree = [{"type": "file", "path": n, "size": len(self.content(commit, n) or b""), "oid": n} for n in names]
            return 200, {}, json.dumps(tree).encode()
        if path.startswith(f"api/models/{REPOSITORY}"):
            revision = path.partition("/revision/")[2] or "main"
            commit = REVISIONS.get(revision)
            if commit is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            names = [{"rfilename": name} for name in (*self.files, "tokenizer_config.json")]
            return 200, {}, json.dumps({"id": REPOSITORY, "sha": commit, "siblings": names}).encode()
        if path.startswith(f"{REPOSITORY}/resolve/"):
            commit, _, name = path.removeprefix(f"{REPOSITORY}/resolve/").partition("/")
            content = self.content(commit, name)
            if content is not None:
                tag = hashlib.sha256(content).hexdigest()
                return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": commit}, content
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def downloaded(self) -> set[str]:
        """The names of files of which a part was asked for."""
        return {path.rsplit("/", 1)[1] for path in self.asked if "/resolve/" in path}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    source = save(tmp_path / "files")
    save_tokenizer(source, "gpt2")
    served = Hub(source)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = served.answer(self.path)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", place)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_tokenizer_comes_without_weights(hub: Hub) -> None:
    tokenizer = tide_jax.load_tokenizer(REPOSITORY)
    assert tokenizer.tokenize("tide")
    assert {"tokenizer.json", "tokenizer_config.json"} <= hub.downloaded()
    assert WEIGHTS not in hub.downloaded()


@pytest.mark.parametrize("revision", REVISIONS)
def test_revisions(revision: str, hub: Hub, tmp_path: Path) -> None:
    length = 100 + list(REVISIONS).index(revision)
    for load in (tide_jax.load_tokenizer, open_tokenizer):
        assert load(f"{REPOSITORY}@{revision}").model_max_length == length
        assert load(REPOSITORY, revision=revision).model_max_length == length
    config = open_config(REPOSITORY, revision=revision)
    assert config == tide_jax.model.files.checkpoint.load_config(f"{REPOSITORY}@{revision}")
    assert open_model(REPOSITORY, revision=revision).config == config
    assert tide_jax.load(f"{REPOSITORY}@{revision}").config == tide_jax.load(REPOSITORY, revision=revision).config
    assert WEIGHTS in hub.downloaded()
    convert(f"{REPOSITORY}@{revision}", tmp_path / "one")
    convert(REPOSITORY, tmp_path / "two", revision=revision)
    for name in ("one", "two"):
        assert tide_jax.load_tokenizer(tmp_path / name).model_max_length == length
    assert {path.split("/")[4] for path in hub.asked if "/resolve/" in path} == {REVISIONS[revision]}


def test_revisions_on_the_command_line(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tide_jax.cli.main.main(["convert", f"{REPOSITORY}@v1.0", str(tmp_path / "out")]) == 0
    assert tide_jax.load_tokenizer(tmp_path / "out").model_max_length == 101
    assert tide_jax.cli.main.main(["inspect", f"{REPOSITORY}@refs/pr/2"]) == 0
    capsys.readouterr()
    assert tide_jax.cli.main.main(["inspect", f"{REPOSITORY}@v9"]) == 2
    message = capsys.readouterr().err
    assert f"'{REPOSITORY}@v9' is not a local path and could not be downloaded" in message
    assert len(message) <= 300


def test_a_revision_of_files_on_disk_is_refused(hub: Hub, tmp_path: Path) -> None:
    convert(REPOSITORY, tmp_path / "out")
    (tmp_path / "m.gguf").write_bytes(b"")
    for source in (tmp_path / "files", tmp_path / "out", tmp_path / "m.gguf"):
        for load in (tide_jax.load, tide_jax.load_tokenizer, tide_jax.model.files.checkpoint.load_config):
            with pytest.raises(TideError, match="is on disk and has no revisions: leave out revision='main'"):
                load(source, revision="main")
    with pytest.raises(TideError, match="give only one of them"):
        tide_jax.load_tokenizer(f"{REPOSITORY}@main", revision="v1.0")
    for wrong in (f"{REPOSITORY}@", "@main", f"{REPOSITORY}@a@b", f"{REPOSITORY}@a b"):
        with pytest.raises(TideError, match="does not exist"):
            tide_jax.load_tokenizer(wrong)
