"""Texts by name, with a publisher that the test plays: nothing here reaches the network."""

import dataclasses
import email.message
import hashlib
import http.client
import io
import re
import urllib.error
import urllib.response
import zipfile
from urllib import request

import pytest

from infer import texts
from infer.texts import TEXTS, Text, TextError, load_limit_small, load_text, python_reference

URL = "https://example.org/novels/"
NOVEL = "Zoë said: “No.”\n".encode()


class Publisher:
    """Answers https requests with `files[url]`: bytes, an error to raise, or an address to go to instead."""

    def __init__(self):
        self.files, self.asked = {}, []

    def https_open(self, asked):
        self.asked.append(asked)
        found = self.files.get(asked.full_url)
        if isinstance(found, Exception):
            raise found
        headers = email.message.Message()
        if isinstance(found, str):
            headers["Location"] = found
        code, body = (404, b"") if found is None else (302, b"") if isinstance(found, str) else (200, found)
        response = urllib.response.addinfourl(io.BytesIO(body), headers, asked.full_url, code)
        response.msg = http.client.responses[code]
        return response


@pytest.fixture
def publisher(monkeypatch, tmp_path):
    """A publisher of the text `novel`, and an empty cache."""
    publisher = Publisher()
    monkeypatch.setattr(request.HTTPSHandler, "https_open", lambda _, asked: publisher.https_open(asked))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    publish(monkeypatch, publisher, "novel", Text(summary="", licence="", url=URL), {"novel.txt": NOVEL})
    return publisher


def publish(monkeypatch, publisher, name, text, files):
    sums = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
    monkeypatch.setitem(TEXTS, name, dataclasses.replace(text, files=sums))
    publisher.files |= {text.url + file: data for file, data in files.items()}


def kept(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_text_is_downloaded_once(publisher, tmp_path):
    assert load_text("novel") == NOVEL.decode()
    assert kept(tmp_path) == ["jaxkv/texts/novel/novel.txt"]
    (asked,) = publisher.asked
    assert asked.get_header("User-agent").startswith("jaxkv/") and 0 < asked.timeout <= 60
    for offline in (False, True):
        assert load_text("novel", offline=offline) == NOVEL.decode()
    assert len(publisher.asked) == 1


def test_the_folder_may_be_given(publisher, tmp_path):
    load_text("novel", folder=tmp_path / "mine")
    assert kept(tmp_path) == ["mine/novel/novel.txt"]
    with pytest.raises(TextError, match="is not there"):
        load_text("novel", offline=True)


@pytest.mark.parametrize("value", ["", "not/absolute"])
def test_the_usual_cache_folder(publisher, tmp_path, monkeypatch, value):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setattr(texts.pathlib.Path, "home", lambda: tmp_path)
    load_text("novel")
    assert kept(tmp_path) == [".cache/jaxkv/texts/novel/novel.txt"]


@pytest.mark.parametrize("damaged", [b"", NOVEL[:-1], NOVEL + b"more", NOVEL.upper()])
def test_a_damaged_copy_is_never_used(publisher, tmp_path, damaged):
    load_text("novel")
    (path,) = tmp_path.rglob("novel.txt")
    path.write_bytes(damaged)
    with pytest.raises(TextError, match=r"novel\.txt is damaged.*offline.*load it once online"):
        load_text("novel", offline=True)
    assert load_text("novel") == NOVEL.decode()
    assert path.read_bytes() == NOVEL and kept(path.parent) == ["novel.txt"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            b"<html>Sign in</html>",
            r"gave 20 bytes with SHA-256 [0-9a-f]{64}; only [0-9a-f]{64} is accepted.*nothing was",
        ),
        (None, r"cannot be downloaded to .*HTTP Error 404: Not Found"),
        (urllib.error.URLError("no route"), r"cannot be downloaded to .*no route"),
        (TimeoutError("timed out"), r"cannot be downloaded to .*timed out"),
        (http.client.IncompleteRead(b"Zo", 9), r"cannot be downloaded to .*IncompleteRead"),
        ("http://example.org/novel.txt", r"cannot be downloaded to .*unknown url type: http>"),
        ("file:///etc/hostname", r"cannot be downloaded to .*file"),
    ],
    ids=["checksum", "404", "no network", "timeout", "cut", "redirect to http", "redirect to file"],
)
def test_a_failed_download_leaves_nothing(publisher, tmp_path, answer, message):
    publisher.files[URL + "novel.txt"] = answer
    with pytest.raises(TextError, match=f"^{re.escape(URL)}novel.txt {message}.*python-reference") as caught:
        load_text("novel")
    assert "\n" not in str(caught.value)
    assert kept(tmp_path) == []


def test_a_redirect_within_https(publisher):
    publisher.files |= {URL + "novel.txt": "https://mirror.example.org/1", "https://mirror.example.org/1": NOVEL}
    assert load_text("novel") == NOVEL.decode()


def test_a_write_that_fails_leaves_nothing(publisher, tmp_path, monkeypatch):
    def replace(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(TextError, match=r"novel\.txt cannot be written: disk full; give a folder"):
        load_text("novel")
    assert kept(tmp_path) == []


def test_a_path(publisher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "novel"
    path.write_bytes(b"mine\r\n")
    for source in (path, str(path), "./novel"):
        assert load_text(source, offline=True) == "mine\r\n"
    path.write_bytes(b"good\xff")
    with pytest.raises(TextError, match=r"novel is not UTF-8: byte 4 cannot be read; convert"):
        load_text(path)
    assert publisher.asked == []


@pytest.mark.parametrize("source", ["tinyshakespear", "", "."])
def test_neither_a_name_nor_a_file(source):
    with pytest.raises(
        TextError, match=rf"^'{re.escape(source)}' is neither .*tinyshakespeare, .*or a path to a UTF-8"
    ):
        load_text(source)


def test_python_reference_needs_no_network(publisher):
    assert load_text("python-reference", offline=True) == python_reference()
    assert len(python_reference()) > 300_000
    assert publisher.asked == []


def test_limit_small(publisher, monkeypatch):
    files = {
        "corpus.jsonl": b'{"_id": "Ann", "title": "", "text": "Ann likes tea."}\n{"_id": "Bo", "text": "Bo likes it."}\n',
        "queries.jsonl": b'{"_id": "q0", "text": "Who likes tea?"}\n{"_id": "q1", "text": "Who likes war?"}\n',
        "qrels.jsonl": b'{"query-id": "q0", "corpus-id": "Ann", "score": 1}\n'
        b'{"query-id": "q0", "corpus-id": "Bo", "score": 1}\n',
    }
    assert list(TEXTS["limit-small"].files) == list(files)
    publish(monkeypatch, publisher, "limit-small", TEXTS["limit-small"], files)
    data = load_limit_small()
    assert data.documents == {"Ann": "Ann likes tea.", "Bo": "Bo likes it."}
    assert data.queries == {"q0": "Who likes tea?", "q1": "Who likes war?"}
    assert data.relevant == {"q0": {"Ann", "Bo"}, "q1": set()}
    assert load_text("limit-small", offline=True) == "Ann likes tea.\nBo likes it."
    assert len(publisher.asked) == 3


def test_state_of_the_union(publisher, monkeypatch):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("state_union/1954-B.txt", b"a \xbd\xa2 decrease")
        files.writestr("state_union/1946-A.txt", "\nMr. Speaker …\n\n")
        files.writestr("state_union/README", "about")
    text = TEXTS["state-of-the-union"]
    publish(monkeypatch, publisher, "state-of-the-union", text, dict.fromkeys(text.files, archive.getvalue()))
    assert load_text("state-of-the-union") == "= 1946-A.txt =\nMr. Speaker …\n\n= 1954-B.txt =\na ½¢ decrease"


def test_the_table():
    """Each address names a commit, each file has a checksum, and each text says what it is."""
    for name, text in TEXTS.items():
        assert re.fullmatch(r"[a-z0-9-]+", name) and text.summary and text.licence
        assert bool(text.url) == bool(text.files) == (name != "python-reference")
        if text.files:
            assert re.fullmatch(
                r"https://raw\.githubusercontent\.com/[\w.-]+/[\w.-]+/[0-9a-f]{40}/([\w.-]+/)*", text.url
            )
        for file, checksum in text.files.items():
            assert re.fullmatch(r"[\w.-]+", file) and re.fullmatch(r"[0-9a-f]{64}", checksum)
