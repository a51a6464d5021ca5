"""Builds the CPU kernels with the system's C++ compiler, once for each machine and source, into a cache.

At install (`python -m enginehouse_backends.llm.kernels.build`) or at first use. Without a compiler there is a
reason to tell the user, and the engine runs on torch alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_FOLDER = Path(__file__).parent
_SOURCES = (
    "program.cpp", "attention.hpp", "coded.hpp", "linear.hpp", "rows.hpp", "simd.hpp", "threads.hpp", "tiles.hpp",
)  # fmt: skip
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
_COMPILERS = ("c++", "g++", "clang++")

logger = logging.getLogger(__name__)


class NoKernels(Exception):
    """The text says why, and what to do about it."""


def kernel_library() -> Path:
    """The built library, building it if this machine has none yet. Raises NoKernels."""
    target = _cache_folder() / f"llm-{_fingerprint()}.so"
    if target.is_file():
        return target
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise NoKernels(
            "no C++ compiler was found (c++, g++ or clang++; or name one in CXX): LLMs on the CPU run on torch "
            "alone, several times slower. Install one, for example with `apt install g++`, and start again"
        )
    logger.info("building the CPU kernels for LLMs with %s into %s", compiler, target)
    _compile(compiler, target)
    return target


def _compile(compiler: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "made.so"
        command = [compiler, *_FLAGS, str(_FOLDER / "program.cpp"), "-o", str(made)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", "") or str(error)
            raise NoKernels(f"building the CPU kernels failed: {' '.join(command)}: {detail[-2000:]}") from error
        os.replace(made, target)  # whoever builds at the same time puts the same file there


def _cache_folder() -> Path:
    named = os.environ.get("ENGINEHOUSE_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "enginehouse"
    return base / "kernels"


def _fingerprint() -> str:
    """Changes with the sources, the flags, and what the processor can do."""
    digest = hashlib.blake2b(digest_size=8)
    for name in _SOURCES:
        digest.update((_FOLDER / name).read_bytes())
    digest.update(" ".join((*_FLAGS, os.environ.get("CXX", ""), platform.machine())).encode())
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file():
        lines = cpu.read_text(errors="replace").splitlines()
        wanted = ("flags", "Features", "model name")
        digest.update("\n".join(sorted({line for line in lines if line.startswith(wanted)})).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    try:
        print(kernel_library())
    except NoKernels as error:
        sys.exit(str(error))
