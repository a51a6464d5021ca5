"""TritonError and TritonModelException, and how an exception out of model.py reads to the client."""

from __future__ import annotations

from types import CodeType, FrameType, TracebackType
from typing import ClassVar

from enginehouse.errors import EnginehouseError, ErrorCode, error_of

_MACHINERY = ("enginehouse_backends/python_model/backend.py", "enginehouse_backends/python_model/loading.py")
_PACKAGE = "enginehouse_backends/python_model/"
_INTERFACE_IN_PYTHON = _PACKAGE + "triton_python_backend_utils.py"
_TYPES = "enginehouse/types.py"


class TritonModelException(Exception):
    """What this interface raises, and what models raise to fail a whole batch."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)

    def message(self) -> str:
        return str(self)


class TritonError:
    """An answer's error: a text and one of the codes below."""

    UNKNOWN: ClassVar[int] = 0
    INTERNAL: ClassVar[int] = 1
    NOT_FOUND: ClassVar[int] = 2
    INVALID_ARG: ClassVar[int] = 3
    UNAVAILABLE: ClassVar[int] = 4
    UNSUPPORTED: ClassVar[int] = 5
    ALREADY_EXISTS: ClassVar[int] = 6
    CANCELLED: ClassVar[int] = 7

    __slots__ = ("_code", "_message")

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        if code not in _CODES:
            raise TypeError(f"TritonError(message: str, code: int): {code!r} is none of its codes")
        self._message = str(message)
        self._code = code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code

    def __str__(self) -> str:
        return self._message


_CODES = {
    TritonError.UNKNOWN: ErrorCode.UNKNOWN,
    TritonError.INTERNAL: ErrorCode.INTERNAL,
    TritonError.NOT_FOUND: ErrorCode.NOT_FOUND,
    TritonError.INVALID_ARG: ErrorCode.INVALID_ARGUMENT,
    TritonError.UNAVAILABLE: ErrorCode.UNAVAILABLE,
    TritonError.UNSUPPORTED: ErrorCode.UNSUPPORTED,
    TritonError.ALREADY_EXISTS: ErrorCode.ALREADY_EXISTS,
    TritonError.CANCELLED: ErrorCode.CANCELLED,
}
_NUMBERS = {code: number for number, code in _CODES.items()}


def to_server(error: TritonError) -> EnginehouseError:
    return error_of(_CODES.get(error.code(), ErrorCode.UNKNOWN), error.message())


def to_model(error: EnginehouseError) -> TritonError:
    return TritonError(error.message, _NUMBERS.get(error.code, TritonError.INTERNAL))


def describe(problem: BaseException) -> str:
    """The exception as Triton's clients read it: type, text, then the frames, innermost first."""
    text = f"{type(problem).__name__}: {str(problem) or '<EMPTY MESSAGE>'}"
    places = [place for place in _places(problem.__traceback__) if not _is_interface(place[0])]
    if not places:
        return text
    lines = "".join(f"  {code.co_filename}({line}): {code.co_name}\n" for code, line in places)
    return f"{text}\n\nAt:\n{lines}"


def _places(traceback: TracebackType | None) -> list[tuple[CodeType, int]]:
    """From where it was raised outwards, up to this backend's own frames."""
    while traceback is not None and _is_machinery(traceback.tb_frame.f_code):
        traceback = traceback.tb_next
    if traceback is None:
        return []
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    places = [(traceback.tb_frame.f_code, traceback.tb_lineno)]
    frame: FrameType | None = traceback.tb_frame.f_back
    while frame is not None and not _is_machinery(frame.f_code):
        places.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return places


def _is_interface(code: CodeType) -> bool:
    """Frames that Triton's clients don't see, because its interface is not Python; all but the config's setters."""
    if code.co_filename.endswith(_INTERFACE_IN_PYTHON):
        return not code.co_name.startswith(("add_", "set_"))
    return _PACKAGE in code.co_filename or code.co_filename.endswith(_TYPES)


def _is_machinery(code: CodeType) -> bool:
    return code.co_filename.endswith(_MACHINERY)
