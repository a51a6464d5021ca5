"""Which file describes a model, and what it says.

    found = read_config(Path("model_repository/digits"), variant="h100")
    found.config        the ModelConfig as written, before normalisation (completion.py)
    found.position("input[0].dims")   where that stands, for messages

A model's folder has one of config.pbtxt, config.yaml, config.yml, config.json; a variant
(--model-config-name) is `configs/<variant>.<spelling>` and falls back to the plain one. A config.json that is
a Hugging Face model's own is not ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from enginehouse.config import json_form, text, yaml_form
from enginehouse.config.building import build
from enginehouse.config.problems import ConfigError, Position
from enginehouse.config.schema import ModelConfig

SUFFIXES = (".pbtxt", ".yaml", ".yml", ".json")
_HUGGING_FACE_KEYS = ("model_type", "architectures", "transformers_version", "_name_or_path")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A config as written. `path` is None for one that came with a request."""

    config: ModelConfig
    path: Path | None = None
    positions: dict[str, Position] = field(default_factory=dict)

    def position(self, path: str) -> Position:
        """Where the field stands, or the nearest field around it."""
        while path and path not in self.positions:
            cut = max(path.rfind("."), path.rfind("["))
            path = path[:cut] if cut > 0 else ""
        return self.positions.get(path) or Position(str(self.path or ""))


def parse_config(content: str, suffix: str, source: str = "") -> ConfigFile:
    """The config in `content`; `suffix` (".pbtxt", …) names its spelling. Raises ConfigError."""
    reader = {".pbtxt": text, ".json": json_form, ".yaml": yaml_form, ".yml": yaml_form}[suffix]
    tree = reader.read_tree(content, source)
    config, positions = build(ModelConfig(), tree, is_text_format=suffix == ".pbtxt")
    return ConfigFile(config, Path(source) if source else None, positions)


def print_config(config: ModelConfig, suffix: str) -> str:
    """The config in the spelling that the suffix names."""
    printer = {
        ".pbtxt": text.print_text,
        ".json": json_form.print_json,
        ".yaml": yaml_form.print_yaml,
        ".yml": yaml_form.print_yaml,
    }
    return printer[suffix](config)


def read_file(path: Path) -> ConfigFile:
    """The config in that file. Raises ConfigError."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"found the spelling '{path.suffix}'", Position(str(path)), allowed=", ".join(SUFFIXES)
        )
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError("found bytes that are not UTF-8", Position(str(path))) from None
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror}", Position(str(path))) from None
    return parse_config(content, path.suffix, str(path))


def config_path(model_directory: Path, variant: str = "") -> Path | None:
    """The file that describes the model. Raises ConfigError if several could."""
    if variant and (path := _only(model_directory / "configs", variant)) is not None:
        return path
    return _only(model_directory, "config")


def read_config(model_directory: Path, variant: str = "") -> ConfigFile | None:
    """What the model's config file says; None if it has none. Raises ConfigError."""
    path = config_path(model_directory, variant)
    return read_file(path) if path is not None else None


def is_hugging_face_config(path: Path) -> bool:
    """Whether this config.json is of a Hugging Face model and not a ModelConfig."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and any(key in content for key in _HUGGING_FACE_KEYS)


def _only(folder: Path, stem: str) -> Path | None:
    paths = [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
    if len(paths) > 1 and stem == "config":
        paths = [path for path in paths if path.suffix != ".json" or not is_hugging_face_config(path)]
    elif paths and paths[0].suffix == ".json" and is_hugging_face_config(paths[0]):
        paths = []
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise ConfigError(f"found {names}", Position(str(folder)), allowed="one config file a model")
    return paths[0] if paths else None
