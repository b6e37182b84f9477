"""Texts for demos and measurements: public ones by name, downloaded once, or the user's own file."""

import dataclasses
import hashlib
import http.client
import io
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from urllib import request

from infer.files import replace_file
from jaxkv import __version__

_Path = str | os.PathLike[str]


class TextError(ValueError):
    """A text cannot be had; the message says what was given, what is accepted, and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A public text.

    Attributes:
      summary: what it is, in a few words.
      licence: its terms.
      url: the publisher's folder, over https, with a slash at its end.
      files: what is downloaded from there: name -> SHA-256. Empty: no network is needed.
      read: from the bytes of `files`, one argument each, to the text.
    """

    summary: str
    licence: str
    url: str = ""
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    read: Callable[..., str] = bytes.decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Documents and queries by id, and for each query the ids of the documents that answer it."""

    documents: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, frozenset[str]]


def load_text(source: _Path, *, offline: bool = False, folder: _Path | None = None) -> str:
    """A public text by its name, or the text of a file.

    Args:
      source: a name in `TEXTS`, or a path to a UTF-8 file. A file whose name is in the table is given as ./NAME.
      offline: use what is in `folder`; never the network.
      folder: where downloads are kept; None = jaxkv/texts in $XDG_CACHE_HOME, or in ~/.cache.
    Raises:
      TextError: neither a name nor a readable file, a file that is not UTF-8, no network, or a wrong checksum.
    Example:
      load_text("tinyshakespeare")[:14]  # 'First Citizen:'
    """
    if isinstance(source, str) and source in TEXTS:
        return TEXTS[source].read(*_files(source, offline, folder))
    try:
        return pathlib.Path(source).read_bytes().decode("utf-8")
    except OSError as error:
        raise TextError(
            f"{str(source)!r} is neither a text nor a file that can be read ({error.strerror or error}); accepted: "
            f"{', '.join(TEXTS)}, or a path to a UTF-8 file"
        ) from error
    except UnicodeDecodeError as error:
        raise TextError(f"{source} is not UTF-8: byte {error.start} cannot be read; convert it to UTF-8") from error


def load_limit_small(*, offline: bool = False, folder: _Path | None = None) -> Retrieval:
    """LIMIT-small: 46 documents and 1,000 queries, two relevant documents each. Args and Raises: as `load_text`.

    Source: On the Theoretical Limitations of Embedding-Based Retrieval, arXiv:2508.21038.
    """
    corpus, queries, pairs = map(_rows, _files("limit-small", offline, folder))
    relevant: dict[str, set[str]] = {row["_id"]: set() for row in queries}
    for row in pairs:
        relevant[row["query-id"]].add(row["corpus-id"])
    return Retrieval(
        documents={row["_id"]: row["text"] for row in corpus},
        queries={row["_id"]: row["text"] for row in queries},
        relevant={query: frozenset(found) for query, found in relevant.items()},
    )


def python_reference() -> str:
    """The prose of the Python language reference as the standard library ships it, about half a million characters."""
    from pydoc_data.topics import topics

    prose = "\n\n".join(topics[name] for name in sorted(topics))
    return re.sub(r"[*`~^=\"|]{2,}", " ", prose)


def _rows(data: bytes) -> list[dict[str, str]]:
    return [json.loads(line) for line in data.splitlines()]


def _documents(corpus: bytes, *_: bytes) -> str:
    return "\n".join(row["text"] for row in _rows(corpus))


def _addresses(archive: bytes) -> str:
    """Every address in the order of its file's name, which is its heading."""
    parts = []
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        for path in sorted(path for path in files.namelist() if path.endswith(".txt")):
            data = files.read(path)
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:  # six files are in older encodings; as Latin-1 every byte is kept
                text = data.decode("latin-1")
            parts.append(f"= {pathlib.PurePosixPath(path).name} =\n{text.strip()}")
    return "\n\n".join(parts)


_GITHUB = "https://raw.githubusercontent.com/"
_WIKITEXT = _GITHUB + "pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/word_language_model/data/wikitext-2/"

# Every address names a commit, so what it serves does not change; a checksum is that of the file at this commit.
TEXTS: dict[str, Text] = {
    "tinyshakespeare": Text(
        summary="40,000 lines of Shakespeare's plays",
        licence="MIT (the repository's)",
        url=_GITHUB + "karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/",
        files={"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
    ),
    "wikitext2-valid": Text(
        summary="validation split of WikiText-2: Wikipedia, split into words, rare ones as <unk>",
        licence="CC BY-SA 3.0 and GFDL",
        url=_WIKITEXT,
        files={"valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"},
    ),
    "wikitext2-test": Text(
        summary="test split of WikiText-2: Wikipedia, split into words, rare ones as <unk>",
        licence="CC BY-SA 3.0 and GFDL",
        url=_WIKITEXT,
        files={"test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"},
    ),
    "pride-and-prejudice": Text(
        summary="Jane Austen's novel in the edition of 1894, as Project Gutenberg has it",
        licence="public domain in the USA",
        url=_GITHUB + "gutenbergbooks/1342/041e520899f9a02af517d6cb253bc1fdfbf923e2/",
        files={"1342-0.txt": "86dab871eec9c0cef97f4cb6313f86c6cc48f6f7809534e65cd3f1c1d486d247"},
    ),
    "state-of-the-union": Text(
        summary="65 addresses of presidents of the USA to Congress, 1945 to 2006",
        licence="public domain",
        url=_GITHUB + "nltk/nltk_data/5db857e6f7df11eabb5e5665836db9ec8df07e28/packages/corpora/",
        files={"state_union.zip": "366c1dc82b2abf896f42b2ec50ba802a0141a29f75d29ca48a7a243ce5bfbe8d"},
        read=_addresses,
    ),
    "limit-small": Text(
        summary="the documents of LIMIT-small, a line each; load_limit_small() has its queries too",
        licence="CC BY 4.0",
        url=_GITHUB + "google-deepmind/limit/90c5dd3a7c3c0d68bc6cc7a0c5b0f4ca124dfdcb/data/limit-small/",
        files={
            "corpus.jsonl": "ebc38fa10c96fa02e4501e41968edf586efffc6241b6cd10f1c8757c1854dc53",
            "queries.jsonl": "0afedee8bb9aec36053568673bc7b5eb3e5fc416b49d44f187026de930084db8",
            "qrels.jsonl": "f6a0cbf1ac3c405e1cffc96c87bd19a5f77a671d123f547cf946bf17874a27f8",
        },
        read=_documents,
    ),
    "python-reference": Text(
        summary="the language reference of the Python that runs; no download",
        licence="PSF",
        read=python_reference,
    ),
}


def _files(name: str, offline: bool, folder: _Path | None) -> list[bytes]:
    if folder is None:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))  # a relative one does not count, by its standard
        folder = (cache if cache.is_absolute() else pathlib.Path.home() / ".cache") / "jaxkv" / "texts"
    text = TEXTS[name]
    return [_file(text.url + one, sha, pathlib.Path(folder, name, one), offline) for one, sha in text.files.items()]


def _file(url: str, sha256: str, path: pathlib.Path, offline: bool) -> bytes:
    """The bytes of `path` if they are there and right, else of `url`, kept in `path`."""
    instead = "Without a network: python-reference, or a path to a UTF-8 file"
    state = "not there"
    if path.is_file():
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        state = "damaged (wrong SHA-256)"
    if offline:
        raise TextError(f"{path} is {state}, and offline nothing is downloaded; load it once online. {instead}")
    try:
        data = _download(url)
    except (OSError, http.client.HTTPException) as error:
        raise TextError(f"{url} cannot be downloaded to {path}: {error}. {instead}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise TextError(
            f"{url} gave {len(data)} bytes with SHA-256 {found}; only {sha256} is accepted, so nothing was kept. "
            f"Try again or on another network. {instead}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise TextError(f"{path} cannot be written: {error}; give a folder that can") from error
    return data


def _download(url: str) -> bytes:
    opener = request.OpenerDirector()  # no handler of http: an address or a redirect outside https is an error
    for handler in (request.ProxyHandler, request.HTTPSHandler, request.HTTPRedirectHandler, request.UnknownHandler,
                    request.HTTPErrorProcessor, request.HTTPDefaultErrorHandler):  # fmt: skip
        opener.add_handler(handler())
    with opener.open(request.Request(url, headers={"User-Agent": f"jaxkv/{__version__}"}), timeout=30) as response:
        return response.read()
