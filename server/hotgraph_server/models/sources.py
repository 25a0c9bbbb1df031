"""Where a model comes from: an embedded name, a folder, a GGUF file or a hub id becomes a place on this disk.

It knows names and paths, not what is in the files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hotgraph_server.errors import ModelLoadError
from hotgraph_server.models import registry
from hotgraph_server.models.download import Progress

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt", "spiece.model")
GGUF_SUFFIX = ".gguf"


@dataclass(frozen=True, slots=True)
class Source:
    """A model on disk: `path` is a Hugging Face folder or a GGUF file. `model_id` is what requests may call it."""

    path: Path
    model_id: str

    @property
    def is_gguf(self) -> bool:
        """Whether `path` is a GGUF file."""
        return self.path.suffix.lower() == GGUF_SUFFIX


def resolve(source: str, *, cache: Path | None = None, progress: Progress | None = None) -> Source:
    """Finds `source`, fetching it first where it is an embedded name or a hub id. Raises ModelLoadError.

    Embedded names come first (write ./NAME for a folder of such a name), then what exists on disk, then hub ids.
    """
    if source in registry.EMBEDDED:
        return Source(registry.pull(source, cache=cache, progress=progress), source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path.resolve())
    if path.is_file():
        if path.suffix.lower() != GGUF_SUFFIX:
            raise ModelLoadError(f"{path}: is neither a folder nor a .gguf file")
        return Source(path.resolve(), path.stem)
    looks_like_path = source.startswith((".", "/", "~")) or source.lower().endswith(GGUF_SUFFIX)
    if looks_like_path or HUB_ID.fullmatch(source) is None:
        raise ModelLoadError(f"{source}: there is no such folder or file")
    return Source(download_snapshot(source), source)


def _folder(path: Path) -> Source:
    if (path / "config.json").is_file():
        return Source(path, path.name)
    files = sorted(entry for entry in path.iterdir() if entry.suffix.lower() == GGUF_SUFFIX)
    if len(files) == 1:
        return Source(files[0], files[0].stem)
    if files:
        raise ModelLoadError(f"{path}: has {len(files)} GGUF files; name one of them")
    raise ModelLoadError(f"{path / 'config.json'}: is missing")


def download_snapshot(hub_id: str) -> Path:
    """The folder of a hub model's newest revision: weights as safetensors, configuration, tokenizer, and no code.

    Without a network, the revision fetched last is used where there is one. Raises ModelLoadError.
    """
    import huggingface_hub  # slow to import, and local models need none of it
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except GatedRepoError as error:  # a kind of RepositoryNotFoundError
        raise ModelLoadError(f"{hub_id}: the hub wants you to accept this model's terms and to be logged in") from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(f"{hub_id}: is no embedded model, no folder, no file, and no model of the hub") from error
    except LocalEntryNotFoundError as error:
        raise ModelLoadError(
            f"{hub_id}: is no embedded model, no folder and no file, and the hub cannot be reached to look there"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelLoadError(f"{hub_id}: cannot be fetched from the hub ({error})") from error
