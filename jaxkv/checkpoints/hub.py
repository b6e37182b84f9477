"""Checkpoints by Hugging Face id: downloaded into huggingface_hub's own cache, or found there."""

import pathlib
import re

from jaxkv.checkpoints.errors import CheckpointError

_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer*")
_UNWANTED = ("*/*", "consolidated*")  # other formats of the same weights
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form owner/name."""
    return _ID.fullmatch(source) is not None


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    config_only: bool = False,
) -> pathlib.Path:
    """The local directory of a repository's safetensors, configuration and tokenizer.

    Args:
      repo_id: owner/name.
      revision: branch, tag or commit; None = main.
      token: access token; None = the one that `hf auth login` stored, if any.
      offline: look into the cache only. HF_HUB_OFFLINE=1 in the environment does the same.
      config_only: config.json and nothing else.
    Raises:
      CheckpointError: no network, no such repository or revision, no access, or no safetensors in it.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors  # errors.HTTPError: of the HTTP library that this version uses

    asked = f"{repo_id}@{revision}" if revision else repo_id
    instead = "A local directory, a .gguf file, or the name smollm2 works without a network."
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            local_files_only=offline,
            allow_patterns=["config.json"] if config_only else list(_WANTED),
            ignore_patterns=list(_UNWANTED),
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{asked} is gated: accept its terms on huggingface.co/{repo_id}, and pass token= or run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id} has no revision {revision!r}; branches and tags: see its page") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"huggingface.co has no model {repo_id!r} that can be seen with this token; check the spelling (no such "
            "local directory exists either), and pass token= if it is private"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "offline mode" if offline or constants.HF_HUB_OFFLINE else "no network"
        raise CheckpointError(
            f"{asked} is not in the local cache and cannot be downloaded ({why}). {instead}"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.HTTPError, OSError) as error:
        raise CheckpointError(f"{asked} cannot be downloaded: {error}. {instead}") from error
    path = pathlib.Path(folder)
    if not config_only and not any(path.glob("*.safetensors")):
        _refuse_other_formats(path, repo_id, revision, token, offline)
    return path


def _refuse_other_formats(path: pathlib.Path, repo_id: str, revision: str | None, token: str | None, offline: bool):
    import huggingface_hub
    from huggingface_hub import errors

    names, known = [file.name for file in path.iterdir()], False
    if not offline:
        try:
            names, known = huggingface_hub.HfApi(token=token).list_repo_files(repo_id, revision=revision), True
        except (errors.HTTPError, errors.OfflineModeIsEnabled, OSError):
            pass  # the message below then speaks of the cache only
    for suffixes, advice in (
        ((".gguf",), "Download the file that you want and give its path."),
        ((".bin", ".pt", ".pth"), "Pickle weights are not safe to open: convert them to safetensors."),
    ):
        found = sorted(name for name in names if name.endswith(suffixes))
        if found:
            raise CheckpointError(f"{repo_id} has no safetensors, only files such as {found[0]}. {advice}")
    where = repo_id if known else f"the local cache of {repo_id}"
    advice = "Nothing in it can be loaded." if known else "Load it once with a network."
    raise CheckpointError(
        f"{where} has no safetensors weights, only {', '.join(sorted(names)[:5]) or 'no'} files. {advice}"
    )
