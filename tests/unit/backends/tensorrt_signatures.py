"""The real signatures of TensorRT's Python API, as its lean runtime documents them, and whether a call fits.

tensorrt_signatures.json was recorded from the packages that it names. To record another version, run this
file in an environment that has `tensorrt-lean`: python tensorrt_signatures.py >> …
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_suffix(".json")
CLASSES = (
    "Runtime", "ICudaEngine", "IExecutionContext", "IOptimizationProfile", "ITimingCache", "IProgressMonitor",
    "IOutputAllocator", "ILogger",
)  # fmt: skip
ENUMS = (
    "DataType", "BuilderFlag", "MemoryPoolType", "TensorIOMode", "TensorLocation", "HardwareCompatibilityLevel",
)  # fmt: skip

Overloads = list[list[tuple[str, str]]]
"""For each way to call it, the arguments' names and types; `self` left out."""


def record(library: Any) -> dict[str, Any]:
    methods: dict[str, Overloads] = {}
    properties: list[str] = []
    for class_name in CLASSES:
        cls = getattr(library, class_name)
        for name in dir(cls):
            if name.startswith("_") and name != "__init__":
                continue
            member = getattr(cls, name)
            if callable(member):
                methods[f"{class_name}.{name}"] = overloads_in(member.__doc__ or "", name)
            else:
                properties.append(f"{class_name}.{name}")
    enums = {name: sorted(getattr(library, name).__members__) for name in ENUMS}
    overridden = {name: overridden_in(getattr(library, name).__doc__ or "") for name in CLASSES}
    return {"methods": methods, "properties": properties, "enums": enums, "overridden": overridden}


def overloads_in(documentation: str, name: str) -> Overloads:
    pattern = re.compile(rf"^(?:\d+\. )?{re.escape(name)}\((self.*)\) -> ", re.MULTILINE)
    return [[argument(text) for text in split(found)[1:]] for found in pattern.findall(documentation)]


def overridden_in(documentation: str) -> dict[str, list[str]]:
    """Methods that the class's documentation asks to be written, with their arguments."""
    found = re.findall(r"def (\w+)\(self(?:, )?([\w, ]*)\):", documentation)
    return {name: [part.strip() for part in arguments.split(",") if part.strip()] for name, arguments in found}


def split(arguments: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth = [""], 0
    for character in arguments:
        depth += {"[": 1, "<": 1, "]": -1, ">": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def argument(text: str) -> tuple[str, str]:
    name, _, kind = text.partition(": ")
    optional = " = " in kind
    return name, kind.partition(" = ")[0].rpartition(".")[2] + ("?" if optional else "")


@functools.cache
def recorded() -> dict[str, Any]:
    """By version."""
    content: dict[str, Any] = json.loads(RECORDED.read_text())
    return content


def fits(value: Any, kind: str) -> bool:
    kind = kind.removesuffix("?")
    if kind in ("SupportsInt", "SupportsIndex"):
        return hasattr(value, "__int__") and not isinstance(value, float)
    if kind == "Buffer":
        return isinstance(value, bytes | bytearray | memoryview)
    if kind == "Dims":
        return isinstance(value, tuple | list)
    if kind.startswith("SupportsInt]"):  # a sequence of numbers
        return isinstance(value, tuple | list)
    builtin = {"str": str, "tuple": tuple, "list": list, "bool": bool, "int": int}.get(kind)
    if builtin is not None:
        return isinstance(value, builtin)
    return any(base.__name__ == kind for base in type(value).__mro__)


def check_call(version: str, method: str, arguments: tuple[Any, ...]) -> None:
    """Raises AssertionError for a call that the real library would refuse."""
    ways: Overloads = recorded()[version]["methods"].get(method, [])
    assert ways, f"TensorRT {version} has no {method}"
    for way in ways:
        needed = [one for one in way if not one[1].endswith("?")]
        if len(needed) <= len(arguments) <= len(way) and all(
            fits(value, kind) for value, (_, kind) in zip(arguments, way, strict=False)
        ):
            return
    raise AssertionError(f"TensorRT {version}: {method}{arguments} fits none of {ways}")


if __name__ == "__main__":
    json.dump({(lean := importlib.import_module("tensorrt_lean")).__version__: record(lean)}, sys.stdout, indent=1)
