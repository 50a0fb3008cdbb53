"""Public recordings by name: downloaded from a pinned commit, or taken from a folder, and verified.

Nothing is redistributed: the catalogue holds where a file is, its licence and its sha256.
"""

import difflib
import http.client
import os
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ndp_gym.importers.source import open_source

TIMEOUT_S = 30.0
_CHUNK = 2**18

OpenUrl = Callable[[urllib.request.Request], Any]  # what urllib.request.urlopen returns
Progress = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A file of a recording; a sidecar is read by the importer beside another file."""

    path: str
    bytes: int
    sha256: str
    sidecar: bool = False


@dataclass(frozen=True, kw_only=True)
class Published:
    """A recording in the catalogue.

    Attributes:
        name: Its name here.
        repository: ``owner/repository`` on GitHub.
        commit: The commit it is pinned to.
        licence: SPDX name.
        importer: Name of the importer that reads it.
        content: What it holds, one line.
        files: Its files.
    """

    name: str
    repository: str
    commit: str
    licence: str
    importer: str
    content: str
    files: tuple[PublishedFile, ...]

    @property
    def folder(self) -> str:
        """Folder of its files in a mirror or the cache, ``owner__repository``."""
        return self.repository.replace("/", "__")

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)

    def url(self, file: PublishedFile) -> str:
        """Where a file is published."""
        template: str = _content()["url"]
        return template.format(repository=self.repository, commit=self.commit, path=file.path)


def catalogue() -> list[Published]:
    """All recordings that can be fetched."""
    rows = []
    for name, row in _content()["recordings"].items():
        listed = tuple(PublishedFile(**file) for file in row["files"])
        rows.append(Published(**{**row, "name": name, "files": listed}))
    return rows


def published(name: str) -> Published:
    """The recording called ``name``.

    Raises:
        ValueError: There is none; names near matches.
    """
    rows = {row.name: row for row in catalogue()}
    if name not in rows:
        near = difflib.get_close_matches(name, rows, n=3, cutoff=0.4) or list(rows)
        raise ValueError(f"unknown recording {name!r}; did you mean: {', '.join(near)}?")
    return rows[name]


def default_cache() -> Path:
    """``ndp-gym/recordings`` below the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ndp-gym" / "recordings"


def from_mirror(recording: Published, mirror: Path) -> list[Path]:
    """Verified paths of the files to import, below ``mirror/owner__repository``, plain or ``.gz``.

    Raises:
        ValueError: A file is absent or not what was published.
    """
    found = {}
    for file in recording.files:
        plain = mirror / recording.folder / file.path
        packed = plain.with_name(plain.name + ".gz")
        path = next((p for p in (plain, packed) if p.is_file()), None)
        if path is None:
            raise ValueError(f"{plain}: not in the mirror, neither plain nor as .gz")
        _verify(path, file)
        found[file] = path
    return [path for file, path in found.items() if not file.sidecar]


def download(
    recording: Published,
    cache: Path,
    *,
    open_url: OpenUrl | None = None,
    progress: Progress = lambda n_bytes: None,
) -> list[Path]:
    """Verified paths of the files to import, downloaded where the cache has none.

    An interrupted download goes on where it stopped; a file whose content is not the published one
    is removed and refused.

    Args:
        recording: What to get.
        cache: Folder that keeps the files.
        open_url: Opens a request; default ``urllib``, which honours the proxy variables.
        progress: Called with the bytes of every piece.

    Raises:
        ValueError: No network, a refusal by the server, or other content than published.
    """
    opener = open_url or _urlopen
    paths = []
    for file in recording.files:
        path = cache / recording.folder / recording.commit / file.path
        if path.is_file():
            _verify(path, file)
            progress(file.bytes)
        else:
            _download(recording.url(file), path, file, opener, progress)
        if not file.sidecar:
            paths.append(path)
    return paths


def _download(
    url: str, path: Path, file: PublishedFile, opener: OpenUrl, progress: Progress
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    have = partial.stat().st_size if partial.is_file() else 0
    if have > file.bytes:
        partial.unlink()
        have = 0
    if have < file.bytes:
        _receive(url, partial, have, file.bytes, opener, progress)
    try:
        _verify(partial, file)
    except ValueError:
        partial.unlink()
        raise
    os.replace(partial, path)


def _receive(
    url: str, partial: Path, have: int, size: int, opener: OpenUrl, progress: Progress
) -> None:
    """Append to ``partial`` what is missing, or all of it where the server cannot resume."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with opener(request) as response:
            resumed = have > 0 and response.status == 206
            total = have if resumed else 0
            progress(total)
            with partial.open("ab" if resumed else "wb") as out:
                while chunk := response.read(_CHUNK):
                    total += len(chunk)
                    if total > size:
                        raise ValueError(f"{url}: must be {size} bytes, got more: not saved")
                    out.write(chunk)
                    progress(len(chunk))
    except urllib.error.HTTPError as error:
        raise ValueError(
            f"{url}: the server refused it with {error.code} {error.reason}; "
            f"get the file elsewhere and name its folder with --mirror"
        ) from None
    except (OSError, EOFError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(f"{url}: not reached ({reason}); {_advice()}") from None
    if total < size:
        raise ValueError(f"{url}: the connection ended after {total} of {size} bytes; {_advice()}")


def _urlopen(request: urllib.request.Request) -> Any:
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def _advice() -> str:
    proxies = sorted(name for name in urllib.request.getproxies() if name != "no")
    through = f"through the proxy set for {', '.join(proxies)}" if proxies else "with no proxy set"
    return (
        f"tried {through} (HTTPS_PROXY): try again to go on, or get the files elsewhere and name "
        f"their folder with --mirror"
    )


def _verify(path: Path, file: PublishedFile) -> None:
    source = open_source(path)
    if source.sha256 != file.sha256:
        raise ValueError(
            f"{path}: sha256 must be {file.sha256}, got {source.sha256}: not the published file"
        )


@cache
def _content() -> dict[str, Any]:
    text = files("ndp_gym.importers").joinpath("catalogue.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
