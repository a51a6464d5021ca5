"""How the server's log looks and what is in it: Triton's line format, ISO 8601 or JSON; live settings.

Everybody logs with the standard library (`logging.getLogger(__name__)`); names under `enginehouse` and
`enginehouse_backends` come out here. INFO and verbose lines go to stdout, warnings and errors to stderr, or
all of them to --log-file. Verbose level n is `verbose(n)`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from enginehouse.errors import Internal, InvalidArgument, Unavailable, Unsupported
from enginehouse.options import ServerOptions

ROOT_LOGGERS = ("enginehouse", "enginehouse_backends")
_LETTERS = {logging.INFO: "I", logging.WARNING: "W", logging.ERROR: "E"}
_FORMATS = {"default": "default", "ISO8601": "ISO8601", "json": "json"}
_FILE_IS_FIXED = "log file location can not be updated through network protocol"


def verbose(level: int) -> int:
    """The logging level of verbose level `level` (1 is the least verbose)."""
    return max(1, logging.DEBUG - (level - 1))


def unescaped() -> dict[str, Any]:
    """`extra=` for a record whose message is a table, to be printed as it is on lines of its own."""
    return {"unescaped": True}


def fields(**values: object) -> dict[str, Any]:
    """`extra=` for what JSON lines should carry as keys of their own: model, version, request_id …"""
    return {"fields": values}


class LogSettings:
    """What is logged and how. Changes take effect at once; `on_change` hears of them."""

    def __init__(
        self,
        *,
        info: bool = True,
        warning: bool = True,
        error: bool = True,
        verbose_level: int = 0,
        format_name: str = "default",
        file: str = "",
        escape: bool = True,
    ) -> None:
        self.info = info
        self.warning = warning
        self.error = error
        self.verbose_level = verbose_level
        self.format_name = format_name
        self.file = file
        self.escape = escape
        self.on_change: Callable[[], None] = lambda: None

    def as_dict(self) -> dict[str, str | bool | int]:
        """In the protocol's names and order."""
        return {
            "log_file": self.file,
            "log_info": self.info,
            "log_warning": self.warning,
            "log_error": self.error,
            "log_verbose_level": self.verbose_level,
            "log_format": self.format_name,
        }

    def shows(self, level: int) -> bool:
        if level >= logging.ERROR:
            return self.error
        if level >= logging.WARNING:
            return self.warning
        if level >= logging.INFO:
            return self.info
        return level >= verbose(self.verbose_level) if self.verbose_level > 0 else False

    def lowest_level(self) -> int:
        """Records below it are not even made."""
        shown = (level for level in (logging.INFO, logging.WARNING, logging.ERROR) if self.shows(level))
        return verbose(self.verbose_level) if self.verbose_level > 0 else next(shown, logging.CRITICAL + 1)

    def apply_json(self, document: Mapping[str, Any]) -> None:
        """An HTTP update. Keys are applied one by one, in the protocol's order, before a bad one is met.

        Raises the errors that Triton answers; unknown keys and nulls are ignored.
        """
        given = {key: document[key] for key in self.as_dict() if document.get(key) is not None}
        for key, value in given.items():
            match key:
                case "log_file":
                    raise Unsupported(_FILE_IS_FIXED)
                case "log_verbose_level":
                    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
                        raise Internal("attempt to access JSON non-unsigned-integer as unsigned-integer")
                case "log_format":
                    if not isinstance(value, str):
                        raise Internal("attempt to access JSON non-string as string")
                    if value not in _FORMATS:
                        raise Unavailable(f"invalid argument for --log_format, got: {value}")
                case _:
                    if not isinstance(value, bool):
                        raise Internal("attempt to access JSON non-boolean as boolean")
            self._set(key, value)

    def apply_grpc(self, settings: Mapping[str, bool | int | str | None]) -> None:
        """The same over gRPC, whose error texts differ. Values have the type of the field that was set, if any."""
        for key, value in ((key, settings[key]) for key in self.as_dict() if key in settings):
            match key:
                case "log_file":
                    raise Unsupported(_FILE_IS_FIXED)
                case "log_verbose_level":
                    if isinstance(value, bool) or not isinstance(value, int):
                        raise InvalidArgument(f"expect int32 for '{key}'")
                case "log_format":
                    if not isinstance(value, str):
                        raise InvalidArgument(f"expect string for '{key}'")
                    if value not in _FORMATS:
                        raise InvalidArgument(f"invalid argument for log_format, got: {value}")
                case _:
                    if not isinstance(value, bool):
                        raise InvalidArgument(f"expect boolean for '{key}'")
            self._set(key, value)

    def _set(self, key: str, value: bool | int | str) -> None:
        name = {"log_verbose_level": "verbose_level", "log_format": "format_name"}.get(key)
        setattr(self, name or key.removeprefix("log_"), value)
        self.on_change()


def log_settings(options: ServerOptions, *, escape: bool = True) -> LogSettings:
    """As the flags say."""
    return LogSettings(
        info=options.log_info,
        warning=options.log_warning,
        error=options.log_error,
        verbose_level=options.log_verbose,
        format_name=options.log_format.value,
        file=options.log_file,
        escape=escape,
    )


class LineFormatter(logging.Formatter):
    """A record as one line (tables as several). Times are UTC, as Triton's."""

    def __init__(self, settings: LogSettings) -> None:
        super().__init__()
        self._settings = settings
        self._pid = os.getpid()

    def format(self, record: logging.LogRecord) -> str:
        letter = _LETTERS.get(record.levelno, "E" if record.levelno > logging.ERROR else "I")
        message = record.getMessage()
        if record.exc_info and record.exc_info[0] is not None:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        if self._settings.format_name == "json":
            return self._json(record, message)
        if getattr(record, "unescaped", False):
            message = f"\n{message}\n"
        elif self._settings.escape:
            message = json.dumps(message, ensure_ascii=False)
        return f"{self._preamble(record, letter)}{message}"

    def _preamble(self, record: logging.LogRecord, letter: str) -> str:
        seconds = time.gmtime(record.created)
        place = f"{self._pid} {record.filename}:{record.lineno}] "
        if self._settings.format_name == "ISO8601":
            return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', seconds)} {letter} {place}"
        microseconds = int(record.created % 1 * 1e6)
        return f"{letter}{time.strftime('%m%d %H:%M:%S', seconds)}.{microseconds:06d} {place}"

    def _json(self, record: logging.LogRecord, message: str) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname if record.levelno >= logging.INFO else "VERBOSE",
            "pid": self._pid,
            "file": record.filename,
            "line": record.lineno,
            "message": message,
        }
        line.update(getattr(record, "fields", {}))
        return json.dumps(line, ensure_ascii=False, default=str)


class LogHandler(logging.Handler):
    """Writes lines to where they belong; whoever opened it closes it."""

    def __init__(self, settings: LogSettings) -> None:
        super().__init__(level=1)
        self.setFormatter(LineFormatter(settings))
        self._settings = settings
        self._file: TextIO | None = None
        if settings.file:
            try:
                self._file = Path(settings.file).open("a", buffering=1)  # noqa: SIM115 (closed by `close`)
            except OSError as error:
                raise InvalidArgument(f"can't write --log-file {settings.file}: {error.strerror}") from None

    def emit(self, record: logging.LogRecord) -> None:
        if not self._settings.shows(record.levelno):
            return
        stream = self._file or (sys.stderr if record.levelno >= logging.WARNING else sys.stdout)
        try:
            stream.write(self.format(record) + "\n")
            stream.flush()
        except (OSError, ValueError):
            self.handleError(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


class ServerLogging:
    """Sends the records of ROOT_LOGGERS to a LogHandler while it is open: `with ServerLogging(settings):`."""

    def __init__(self, settings: LogSettings) -> None:
        self.settings = settings
        self._handler = LogHandler(settings)
        self._before: list[tuple[logging.Logger, int, bool]] = []

    def __enter__(self) -> ServerLogging:
        for logger in map(logging.getLogger, ROOT_LOGGERS):
            self._before.append((logger, logger.level, logger.propagate))
            logger.addHandler(self._handler)
            logger.propagate = False
        self.settings.on_change = self._apply_levels
        self._apply_levels()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settings.on_change = lambda: None
        for logger, level, propagate in self._before:
            logger.removeHandler(self._handler)
            logger.setLevel(level)
            logger.propagate = propagate
        self._before.clear()
        self._handler.close()

    def _apply_levels(self) -> None:
        for logger in map(logging.getLogger, ROOT_LOGGERS):
            logger.setLevel(self.settings.lowest_level())


def escaping_wanted(environment: Mapping[str, str]) -> bool:
    """TRITON_SERVER_ESCAPE_LOG_MESSAGES=0 prints messages raw; then whoever writes one can forge lines."""
    return environment.get("TRITON_SERVER_ESCAPE_LOG_MESSAGES", "1").lower() not in ("0", "false")


_MODEL_LEVELS = {"INFO": logging.INFO, "WARNING": logging.WARNING, "ERROR": logging.ERROR}


def log_for_model(level: str, message: str, file: str, line: int) -> None:
    """A line that a model wrote through its Services: INFO, WARNING, ERROR or VERBOSE; any thread."""
    number = _MODEL_LEVELS.get(level.upper(), logging.DEBUG)
    logger = logging.getLogger("enginehouse_backends.model")
    if logger.isEnabledFor(number):
        logger.handle(logger.makeRecord(logger.name, number, file, line, message, (), None))
