"""Which Python a model's process runs on: the server's own, or one made for the model and kept.

In order: `serving.python` of the config, Triton's EXECUTION_ENV_PATH (a conda-pack or venv archive, or a
folder), a requirements.txt beside the model. Environments are made once for their content, under a lock, in a
folder that other servers on the machine share.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from enginehouse.backend import LoadContext
from enginehouse.errors import InvalidArgument, NotFound, Unavailable
from enginehouse.execution.spawning import Launch

EXECUTION_ENV_PATH = "EXECUTION_ENV_PATH"
_MODEL_DIRECTORY = "$$TRITON_MODEL_DIRECTORY"
_TAIL_LINES = 15

_logger = logging.getLogger("enginehouse.execution")


def default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "enginehouse" / "environments"


class Environments:
    """One per server."""

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache or default_cache()

    async def launch_for(self, context: LoadContext) -> Launch:
        """How to start the model's process. May take minutes the first time.

        Raises NotFound, InvalidArgument or Unavailable, saying what is missing or what failed.
        """
        said = context.config.serving.python
        variables = dict(said.variables)
        interpreter = await asyncio.to_thread(self._interpreter, context)
        return Launch(str(interpreter or sys.executable), variables)

    def _interpreter(self, context: LoadContext) -> Path | None:
        """None for the server's own."""
        said = context.config.serving.python
        directory = context.model_directory
        if said.interpreter:
            return _checked(directory / said.interpreter)
        archive = said.archive or context.parameter(EXECUTION_ENV_PATH)
        if archive:
            return self._from_archive(directory / archive.replace(_MODEL_DIRECTORY, str(directory)))
        requirements = _requirements_of(context)
        if requirements is None or is_satisfied(requirements.read_text()):
            return None
        return self._from_requirements(requirements)

    def _from_archive(self, archive: Path) -> Path:
        if archive.is_dir():
            return _checked(archive / "bin" / "python")
        if not archive.is_file():
            raise NotFound(f"python environment not found: {archive}")
        status = archive.stat()
        key = f"{archive.resolve()}:{status.st_size}:{status.st_mtime_ns}"

        def make(folder: Path) -> None:
            _logger.info("unpacking the python environment %s", archive)
            _unpack(archive, folder)
            unpack_script = folder / "bin" / "conda-unpack"
            if unpack_script.exists():
                _run([str(folder / "bin" / "python"), str(unpack_script)], f"conda-unpack of {archive}")

        return _checked(self._made_once("archive", key, make) / "bin" / "python")

    def _from_requirements(self, requirements: Path) -> Path:
        text = requirements.read_text()
        key = f"{sys.version}:{text}:{requirements.parent if _names_files(text) else ''}"

        def make(folder: Path) -> None:
            _logger.info("making a python environment from %s", requirements)
            _run([sys.executable, "-m", "venv", str(folder)], f"the environment of {requirements}")
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
            _run([*pip, "-r", str(requirements)], f"installing {requirements}", requirements.parent)

        return self._made_once("requirements", key, make) / "bin" / "python"

    def _made_once(self, kind: str, key: str, make: Callable[[Path], None]) -> Path:
        """A folder that `make` has filled, now or earlier; half-made ones are never used."""
        folder = self._cache / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
        done = folder / ".made"
        with _locked(folder.with_suffix(".lock")):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    folder.mkdir(parents=True)
                    make(folder)
                    done.touch()
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
        return folder


def _requirements_of(context: LoadContext) -> Path | None:
    said = context.config.serving.python.requirements
    if said:
        path = context.model_directory / said
        if not path.is_file():
            raise NotFound(f"requirements file of model '{context.name}' not found: {path}")
        return path
    for folder in (context.version_directory, context.model_directory):
        if (folder / "requirements.txt").is_file():
            return folder / "requirements.txt"
    return None


def _names_files(requirements: str) -> bool:
    """Whether the lines mean something else in another folder: paths, or options that may hold some."""
    return any(line.strip().startswith((".", "/", "-")) or "file:" in line for line in requirements.splitlines())


def is_satisfied(requirements: str) -> bool:
    """Whether this interpreter has all that is listed. Lines that are no plain requirement count as missing."""
    for line in requirements.splitlines():
        line = line.partition(" #")[0].strip()
        if not line or line.startswith("#"):
            continue
        try:
            requirement = Requirement(line)
            if requirement.marker is not None and not requirement.marker.evaluate():
                continue
            installed = metadata.version(requirement.name)
        except (InvalidRequirement, metadata.PackageNotFoundError):
            return False
        if requirement.url or not requirement.specifier.contains(installed, prereleases=True):
            return False
    return True


def _checked(interpreter: Path) -> Path:
    """Raises NotFound if it isn't there, InvalidArgument if it can't run a worker."""
    if not interpreter.exists():
        raise NotFound(f"python interpreter not found: {interpreter}")
    script = "import sys; print(*sys.version_info[:2])"
    answer = _run([str(interpreter), "-c", script], f"the interpreter {interpreter}")
    version = tuple(int(word) for word in answer.split())
    if version != sys.version_info[:2]:
        raise InvalidArgument(
            f"python interpreter {interpreter} is version {version[0]}.{version[1]}: a model's environment needs the "
            f"server's {sys.version_info[0]}.{sys.version_info[1]}"
        )
    return interpreter


def _unpack(archive: Path, folder: Path) -> None:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                zipped.extractall(folder)
        else:
            with tarfile.open(archive) as packed:
                packed.extractall(folder, filter="tar")
    except (tarfile.TarError, zipfile.BadZipFile, OSError) as problem:
        raise InvalidArgument(f"python environment {archive} can't be unpacked: {problem}") from problem


def _run(command: Sequence[str], what: str, folder: Path | None = None) -> str:
    """Its output. Raises Unavailable with the last lines if it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as problem:
        raise Unavailable(f"{what} failed: {problem}") from problem
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-_TAIL_LINES:])
        raise Unavailable(f"{what} failed: {tail}")
    return done.stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for other threads and servers that make the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
