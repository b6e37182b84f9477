"""Hugging Face ids, offline, on a cache directory in the hub's layout that the test makes."""

import pathlib
import sys

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from jaxkv.checkpoints import CheckpointError, open_checkpoint, read_config
from jaxkv.checkpoints.hub import fetch, is_hub_id

GOLDENS = pathlib.Path(__file__).parent / "goldens"
HTTP = sys.modules[errors.HTTPError.__module__.split(".")[0]]  # httpx, or its successor
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; nothing here may reach the network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def cached(cache: pathlib.Path, repo_id: str, files: dict[str, bytes], *, branch: str = "main") -> pathlib.Path:
    folder = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for path in (folder / "blobs", folder / "refs", snapshot):
        path.mkdir(parents=True)
    (folder / "refs" / branch).write_text(COMMIT)
    for number, (name, data) in enumerate(files.items()):
        (folder / "blobs" / str(number)).write_bytes(data)
        (snapshot / name).symlink_to(folder / "blobs" / str(number))
    return snapshot


def files_of(case: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (GOLDENS / case).iterdir() if path.suffix != ".npz"}


@pytest.mark.parametrize("case", ["qwen2", "llama3"])
@pytest.mark.parametrize("branch", ["main", "v1.0"])
def test_a_cached_repository_loads(cache, case, branch):
    snapshot = cached(cache, "somebody/tiny", files_of(case), branch=branch)
    revision = None if branch == "main" else branch
    for offline in (True, False):  # the argument, and the environment variable alone
        checkpoint = open_checkpoint("somebody/tiny", dtype="float32", revision=revision, offline=offline)
        assert checkpoint.source == snapshot
        assert checkpoint.config == read_config(GOLDENS / case)
    assert read_config("somebody/tiny", revision=revision) == checkpoint.config
    assert open_checkpoint("somebody/tiny", dtype="float32", revision=COMMIT).config == checkpoint.config


def test_not_in_the_cache(cache):
    cached(cache, "somebody/tiny", files_of("qwen2"))
    for ask in ({"revision": "v2"}, {"revision": "v2", "offline": True}):
        with pytest.raises(CheckpointError, match=r"somebody/tiny@v2 is not in the local cache.*offline mode.*smollm2"):
            open_checkpoint("somebody/tiny", dtype="float32", **ask)
    with pytest.raises(CheckpointError, match=r"nobody/nothing is not in the local cache"):
        read_config("nobody/nothing", offline=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.Q4_K_M.gguf", r"only files such as model\.Q4_K_M\.gguf.*give its path"),
        ("pytorch_model.bin", r"only files such as pytorch_model\.bin.*not safe"),
        (
            "README.md",
            r"the local cache of somebody/other has no safetensors weights, only README\.md, config\.json files",
        ),
    ],
)
def test_other_formats_are_refused(cache, name, message):
    cached(cache, "somebody/other", {"config.json": b"{}", name: b""})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("somebody/other", dtype="float32", offline=True)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("somebody/other", dtype="float32")


def response(status: int):
    return HTTP.Response(status, request=HTTP.Request("GET", "https://huggingface.co/api/models/a/b"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("gated", response=response(403)), r"a/b@v9 is gated.*huggingface\.co/a/b.*token="),
        (errors.RepositoryNotFoundError("no", response=response(404)), r"no model 'a/b'.*spelling"),
        (errors.RevisionNotFoundError("no", response=response(404)), r"a/b has no revision 'v9'"),
        (errors.LocalEntryNotFoundError("no"), r"a/b@v9 is not in the local cache.*no network.*local directory"),
        (errors.HfHubHTTPError("busy", response=response(503)), r"a/b@v9 cannot be downloaded: busy.*\.gguf"),
        (HTTP.ConnectError("refused"), r"a/b@v9 cannot be downloaded: refused.*smollm2 works"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_hub(monkeypatch, error, message):
    """Each error that huggingface_hub raises becomes one sentence with the id and what to do."""

    def download(*args, **settings):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match=message):
        fetch("a/b", revision="v9")


def test_what_is_asked_for(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **rest: asked.update(rest) or str(tmp_path))
    assert fetch("a/b", revision="r", token="t", offline=True) == tmp_path
    assert (asked["revision"], asked["token"], asked["local_files_only"]) == ("r", "t", True)
    wanted, unwanted = asked["allow_patterns"], asked["ignore_patterns"]
    names = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "pytorch_model.bin",
    ]
    names += ["original/consolidated.00.pth", "onnx/model.safetensors", "consolidated.safetensors", "a.gguf", "c.jinja"]
    kept = huggingface_hub.utils.filter_repo_objects(names, allow_patterns=wanted, ignore_patterns=unwanted)
    assert list(kept) == [*names[:4], "c.jinja"]


def test_forms_of_an_id():
    for text in ("HuggingFaceTB/SmolLM2-135M-Instruct", "a/b.c_d-1"):
        assert is_hub_id(text)
    for text in ("gpt2", "a/b/c", "./a", "/a/b", "a/", "a b/c", "~/a"):
        assert not is_hub_id(text)
