"""Where options come from: flags before environment variables before the YAML file before defaults.

Generic over a frozen dataclass whose fields are made by `flag()`: field `http_port` is the flag
`--http-port`, the variable ENGINEHOUSE_HTTP_PORT and the YAML key `http-port`.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from enginehouse.option_values import OptionError, boolean

ENVIRONMENT_PREFIX = "ENGINEHOUSE_"
_KEY = "flag"


@dataclass(frozen=True, slots=True)
class Flag:
    """How one option is spelt and read. `repeated` ones collect every occurrence into a tuple."""

    group: str
    parse: Callable[[str], Any]
    help: str
    repeated: bool
    aliases: tuple[str, ...] = ()
    deprecated: str = ""
    """What to use instead; the flag still works."""
    has_effect: bool = True
    """False for one that is there so that scripts for Triton run; whoever sets it is warned."""
    num_words: int = 1
    """So many arguments may be one value, as some of Triton's OpenAI flags have it."""


def flag(
    group: str,
    default: Any,
    parse: Callable[[str], Any],
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    deprecated: str = "",
    has_effect: bool = True,
    num_words: int = 1,
) -> Any:
    """A dataclass field that is an option; a default of () makes it a repeated one."""
    known = Flag(group, parse, help, default == (), aliases, deprecated, has_effect, num_words)
    return dataclasses.field(default=default, metadata={_KEY: known})


class HelpRequested(Exception):
    """`-h` or `--help` was among the arguments; the text is the usage."""


@dataclass(frozen=True, slots=True)
class Parsed:
    values: dict[str, Any]
    """By field name, only what was given."""
    warnings: tuple[str, ...]


def parse(options: type, argv: Sequence[str], environment: Mapping[str, str]) -> Parsed:
    """Raises OptionError (text for the terminal) and HelpRequested."""
    flags = _flags_by_name(options)
    given = _read_arguments(flags, argv)
    from_environment, warnings = _read_environment(flags, environment)
    config_file = (given.get("config-file") or from_environment.get("config-file") or [""])[-1]
    from_file = _read_file(flags, Path(config_file)) if config_file else {}
    texts = {**from_file, **from_environment, **given}
    values = {}
    for name, raw in texts.items():
        field_name, known = flags[name]
        try:
            parsed = [known.parse(item) for item in raw]
        except OptionError as error:
            raise OptionError(f'Bad option: "--{name}".\n{error}') from None
        if known.deprecated:
            instead = f"Please use '{known.deprecated}' instead."
            warnings.append(f"Warning: '--{name}' has been deprecated! {instead}")
        if not known.has_effect:
            warnings.append(f"Warning: '--{name}' has no effect on this server.")
        values[field_name] = tuple(parsed) if known.repeated else parsed[-1]
    return Parsed(values, tuple(warnings))


def usage(options: type) -> str:
    """Every flag by group, as `--help` shows them."""
    groups: dict[str, list[str]] = {}
    for field in dataclasses.fields(options):
        known: Flag | None = field.metadata.get(_KEY)
        if known is None:
            continue
        lines = groups.setdefault(known.group, [])
        repeat = " (may be repeated)" if known.repeated else ""
        lines.append(f"  --{_dashed(field.name)} <{_argument(known.parse)}>{repeat}")
        note = f"Deprecated: use {known.deprecated}. " if known.deprecated else ""
        note += "" if known.has_effect else "Accepted for compatibility, without effect. "
        default = f" Default: {field.default}." if field.default not in ("", (), None) else ""
        lines += textwrap.wrap(f"{note}{known.help}{default}", 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(line for group, lines in groups.items() for line in ("", f"{group}:", *lines))


def _argument(parse: Callable[[str], Any]) -> str:
    """What the usage shows for the value: parsers that are made say their form, others are named for it."""
    return str(getattr(parse, "form", parse.__name__))


def _dashed(field_name: str) -> str:
    return field_name.replace("_", "-")


def _flags_by_name(options: type) -> dict[str, tuple[str, Flag]]:
    found: dict[str, tuple[str, Flag]] = {}
    for field in dataclasses.fields(options):
        known: Flag | None = field.metadata.get(_KEY)
        if known is not None:
            for name in (_dashed(field.name), *known.aliases):
                found[name] = (field.name, known)
    return found


def _in_full(flags: Mapping[str, tuple[str, Flag]], name: str) -> str:
    """A beginning that only one flag has stands for it, as with getopt: scripts for Triton rely on that."""
    if name in flags:
        return name
    meant = {_canonical(flags, each) for each in flags if each.startswith(name)}
    return meant.pop() if len(meant) == 1 else name


def _known(flags: Mapping[str, tuple[str, Flag]], name: str, written: str) -> Flag:
    if name in flags:
        return flags[name][1]
    nearest = difflib.get_close_matches(name, flags, n=1, cutoff=0.0)
    raise OptionError(f"unrecognized option '{written}': did you mean '--{nearest[0]}'?")


def _canonical(flags: Mapping[str, tuple[str, Flag]], name: str) -> str:
    """An alias by its own name would hide the other spelling's values."""
    return _dashed(flags[name][0])


def _read_arguments(flags: Mapping[str, tuple[str, Flag]], argv: Sequence[str]) -> dict[str, list[str]]:
    given: dict[str, list[str]] = {}
    words = iter(zip(argv, [*argv, None][1:], strict=True))  # each word with the one after it
    for word, following in words:
        if word in ("-h", "--help"):
            raise HelpRequested
        if not word.startswith("--"):
            raise OptionError(f"Unexpected argument: {word}")
        name, equals, value = word[2:].partition("=")
        name = _in_full(flags, name)
        known = _known(flags, name, f"--{name}")
        if not equals:
            if known.parse is boolean and not _is_boolean(following):
                value = "true"
            elif following is None:
                raise OptionError(f"option '--{name}' requires an argument")
            else:
                value = following
                next(words)
                value = " ".join((value, *_more_words(value, known.num_words, words)))
        given.setdefault(_canonical(flags, name), []).append(value)
    return given


def _more_words(first: str, num_words: int, words: Iterator[tuple[str, str | None]]) -> list[str]:
    """What else belongs to a value of several words; nothing if the first holds all of it."""
    if num_words == 1 or any(mark in first for mark in " :="):
        return []
    return [word for word, _ in itertools.islice(words, num_words - 1)]


def _is_boolean(word: str | None) -> bool:
    return word is not None and word.lower() in ("true", "false", "1", "0", "on", "off")


def _read_environment(
    flags: Mapping[str, tuple[str, Flag]], environment: Mapping[str, str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Repeated options hold several values separated by `;`. Unknown names only warn: others own some."""
    given: dict[str, list[str]] = {}
    warnings = []
    for variable, value in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("_", "-")
        if name in flags:
            repeated = flags[name][1].repeated
            given[_canonical(flags, name)] = [v for v in value.split(";") if v] if repeated else [value]
        elif near := difflib.get_close_matches(name, flags, n=1, cutoff=0.8):
            meant = ENVIRONMENT_PREFIX + near[0].upper().replace("-", "_")
            warnings.append(f"Warning: {variable} is no option and is ignored: did you mean {meant}?")
    return given, warnings


def _read_file(flags: Mapping[str, tuple[str, Flag]], path: Path) -> dict[str, list[str]]:
    try:
        document = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise OptionError(f"can't read --config-file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise OptionError(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise OptionError(f"{path}: expected options as keys and values, found {type(document).__name__}")
    given: dict[str, list[str]] = {}
    for key, value in document.items():
        name = _dashed(str(key))
        try:
            known = _known(flags, name, str(key))
        except OptionError as error:
            raise OptionError(f"{path}: {error}") from None
        given[_canonical(flags, name)] = list(_spelt(path, str(key), value, known.repeated))
    return given


def _spelt(path: Path, key: str, value: object, repeated: bool) -> Iterator[str]:
    """The flag texts that a YAML value stands for; mappings become `scope,key=value`."""
    if isinstance(value, bool):
        yield "true" if value else "false"
    elif isinstance(value, str | int | float):
        yield str(value)
    elif repeated and isinstance(value, list):
        for item in value:
            yield from _spelt(path, key, item, repeated)
    elif repeated and isinstance(value, dict):
        for outer, inner in value.items():
            if isinstance(inner, dict):
                yield from (f"{outer},{text_}" for text_ in _spelt(path, key, inner, repeated))
            else:
                yield from (f"{outer}={text_}" for text_ in _spelt(path, key, inner, repeated))
    else:
        raise OptionError(f"{path}: '{key}' can't be {type(value).__name__}")
