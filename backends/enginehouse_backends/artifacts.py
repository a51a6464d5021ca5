"""Which file of a version folder a backend loads, and how much of the device's memory it will take.

The rules for names are Triton's: `default_model_filename`, and `cc_model_filenames` where the GPU's compute
capability has an entry.
"""

from __future__ import annotations

from pathlib import Path

from enginehouse.backend import LoadContext
from enginehouse.errors import NotFound


def artifact_path(context: LoadContext, *defaults: str, compute_capability: str = "") -> Path:
    """The artifact. Where the config names none, the first of `defaults` that is there.

    Raises NotFound that names what was looked for and what the folder holds.
    """
    config = context.config
    named = config.cc_model_filenames[compute_capability] if _has_entry(context, compute_capability) else ""
    named = named or config.default_model_filename
    candidates = [context.version_directory / name for name in ((named,) if named else defaults)]
    for path in candidates:
        if path.exists():
            return path
    raise NotFound(f"model '{context.name}': unable to find {' or '.join(map(str, candidates))}; {_holds(context)}")


def _has_entry(context: LoadContext, compute_capability: str) -> bool:
    return bool(compute_capability) and compute_capability in context.config.cc_model_filenames


def _holds(context: LoadContext) -> str:
    folder = context.version_directory
    if not folder.is_dir():
        return "there is no such version folder"
    names = sorted(path.name for path in folder.iterdir())
    return f"the version folder holds {', '.join(names)}" if names else "the version folder is empty"


def total_bytes(*paths: Path) -> int:
    """Sizes added up; folders count with everything in them, missing files not at all."""
    files = [inner for path in paths for inner in (path.rglob("*") if path.is_dir() else (path,))]
    return sum(file.stat().st_size for file in files if file.is_file())
