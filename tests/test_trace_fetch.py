"""``ndp-gym trace fetch``: the catalogue, mirrors, and downloads from a pretended server."""

import errno
import http.client
import io
import re
import urllib.error
from collections.abc import Callable
from dataclasses import replace
from email.message import Message
from pathlib import Path
from urllib.request import Request

import pytest

from ndp_gym.cli import main
from ndp_gym.importers import FORMATS, import_trace
from ndp_gym.importers.fetch import Published, catalogue, download, from_mirror, published
from ndp_gym.importers.known import known_source
from ndp_gym.importers.source import open_source
from ndp_gym.trace import RoutingTrace

LICENCES = {"MIT", "Apache-2.0"}


class Answer(io.BytesIO):
    """A response of ``urlopen``."""

    def __init__(self, body: bytes, status: int) -> None:
        super().__init__(body)
        self.status = status


class Server:
    """Serves one content for every URL, in ranges where it can, and remembers what was asked."""

    def __init__(self, content: bytes, *, breaks_after: int | None = None, ranges: bool = True):
        self.content, self.breaks_after, self.ranges = content, breaks_after, ranges
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, request: Request) -> Answer:
        wanted = request.get_header("Range")
        self.asked.append((request.full_url, wanted))
        first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        resumed = bool(wanted) and self.ranges
        body = self.content[first:] if resumed else self.content
        return Answer(body[: self.breaks_after], 206 if resumed else 200)


@pytest.fixture(scope="module")
def small(shared_traces: Path) -> tuple[Published, bytes]:
    """The catalogue's smallest recording without its sidecar, and its content."""
    recording = published("switch-base-8")
    file = next(file for file in recording.files if not file.sidecar)
    data = open_source(shared_traces / recording.folder / file.path).data
    return replace(recording, files=(file,)), data


def test_every_recording_is_pinned_licensed_and_has_an_importer() -> None:
    rows = catalogue()
    assert len({row.repository for row in rows}) == 5
    for row in rows:
        assert row.licence in LICENCES
        assert row.importer in FORMATS
        assert len(row.commit) == 40
        for file in row.files:
            assert len(file.sha256) == 64
            assert row.url(file).startswith("https://")
            assert f"{row.repository}/{row.commit}/{file.path}" in row.url(file)
        facts = known_source([file.sha256 for file in row.files if not file.sidecar])
        assert facts is not None
        assert (facts.licence, row.repository in facts.source) == (row.licence, True)


@pytest.mark.shared
def test_the_catalogue_agrees_with_the_attribution_of_all_five_sources(shared_traces: Path) -> None:
    text = (shared_traces / "ATTRIBUTION.md").read_text()
    attributed = {
        path: sha256
        for sha256, path in re.findall(r"^([0-9a-f]{64})  (\S+)$", text, re.M)
        if not path.endswith(("/LICENSE", "/prompt-manifest.json"))  # texts, not routing
    }
    files = {f"{row.folder}/{file.path}": (row, file) for row in catalogue() for file in row.files}
    assert {path: file.sha256 for path, (_, file) in files.items()} == attributed
    for path, (row, file) in files.items():
        (line,) = [line for line in text.splitlines() if f"`{row.folder}` |" in line]
        assert f"github.com/{row.repository} @ {row.commit}" in line
        assert f"| {row.licence}" in line
        plain = shared_traces / path
        source = open_source(plain if plain.is_file() else plain.with_name(plain.name + ".gz"))
        assert (source.sha256, len(source.data)) == (file.sha256, file.bytes)


@pytest.mark.shared
@pytest.mark.parametrize("name", [row.name for row in catalogue()])
def test_every_recording_comes_out_of_a_mirror_as_a_trace(shared_traces, tmp_path, name, capsys):
    out = tmp_path / "t"
    arguments = ["trace", "fetch", name, "--mirror", str(shared_traces), "--out", str(out)]
    assert main(arguments) == 0
    assert "Wrote" in capsys.readouterr().out
    trace = RoutingTrace.open(out)
    recording = published(name)
    assert trace.metadata.licence == recording.licence
    assert recording.commit in trace.metadata.source
    again = import_trace(from_mirror(recording, shared_traces), recording.importer).trace
    assert again.sha256 == trace.sha256


def test_without_a_name_the_catalogue_is_listed(capsys) -> None:
    assert main(["trace", "fetch"]) == 0
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in catalogue())


@pytest.mark.shared
def test_a_download_is_verified_kept_and_not_repeated(small, tmp_path) -> None:
    recording, data = small
    server = Server(data)
    got: list[int] = []
    (path,) = download(recording, tmp_path, open_url=server, progress=got.append)
    assert path.read_bytes() == data
    assert sum(got) == recording.bytes
    assert download(recording, tmp_path, open_url=server) == [path]
    assert server.asked == [(recording.url(recording.files[0]), None)]


@pytest.mark.shared
@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on_where_it_stopped(small, tmp_path, ranges) -> None:
    recording, data = small
    with pytest.raises(ValueError, match=r"ended after 1000 of 38153 bytes; .*try again to go on"):
        download(recording, tmp_path, open_url=Server(data, breaks_after=1000))
    server = Server(data, ranges=ranges)
    (path,) = download(recording, tmp_path, open_url=server)
    assert server.asked[0][1] == "bytes=1000-"
    assert path.read_bytes() == data
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


@pytest.mark.shared
def test_other_content_than_published_is_refused_and_not_kept(small, tmp_path) -> None:
    recording, data = small
    forged = data.replace(b"1", b"2", 1)
    with pytest.raises(ValueError, match="sha256 must be 63f4"):
        download(recording, tmp_path, open_url=Server(forged))
    with pytest.raises(ValueError, match="must be 38153 bytes, got more"):
        download(recording, tmp_path, open_url=Server(data + b" "))
    assert download(recording, tmp_path, open_url=Server(data))
    (kept,) = (p for p in tmp_path.rglob("*") if p.is_file())
    kept.write_bytes(forged)
    with pytest.raises(ValueError, match="not the published file"):
        download(recording, tmp_path, open_url=Server(data))
    mirror = tmp_path / "mirror" / recording.folder / recording.files[0].path
    mirror.parent.mkdir(parents=True)
    mirror.write_bytes(forged)
    with pytest.raises(ValueError, match="not the published file"):
        from_mirror(recording, tmp_path / "mirror")


def failing(error: Exception) -> Callable[[Request], Answer]:
    def opener(_request: Request) -> Answer:
        raise error

    return opener


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            urllib.error.URLError(OSError(errno.ENETUNREACH, "Network is unreachable")),
            "unreachable",
        ),
        (urllib.error.URLError("Tunnel connection failed: 407"), "Tunnel connection failed: 407"),
        (TimeoutError("timed out"), "timed out"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "reset by peer"),
        (http.client.InvalidURL("nonnumeric port: 'port'"), "nonnumeric port"),
        (http.client.BadStatusLine("SSH-2.0"), "SSH-2.0"),
        (urllib.error.HTTPError("u", 404, "Not Found", Message(), None), "404 Not Found"),
    ],
)
@pytest.mark.parametrize("proxy", [None, "http://localhost:1"])
def test_no_network_is_one_sentence_that_says_what_to_do(
    tmp_path, monkeypatch, error, message, proxy
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    if proxy:
        monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setattr("ndp_gym.importers.fetch._urlopen", failing(error))
    with pytest.raises(ValueError, match=message) as caught:
        download(published("olmoe-1b-7b"), tmp_path)
    text = str(caught.value)
    assert "--mirror" in text
    assert "\n" not in text
    if not isinstance(error, urllib.error.HTTPError):
        assert ("the proxy set for https" in text) == bool(proxy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["olmo"], "did you mean: olmoe-1b-7b"),
        (["olmoe-1b-7b", "--mirror", "nowhere"], "not in the mirror"),
        (["olmoe-1b-7b", "--out", "no/folder/t"], "--out must be a file in a folder"),
    ],
)
def test_bad_wishes_are_one_sentence(arguments, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["trace", "fetch", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
