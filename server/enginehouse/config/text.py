"""config.pbtxt: protobuf's text format, read into a tree with positions, and printed.

Grammar: protobuf.dev's "Text Format Language Specification", without extensions and `Any`. A parser of our
own, because protobuf's gives no positions for the checks that come later and names no field in its errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf import text_format

from enginehouse.config.problems import ConfigError, Position
from enginehouse.config.schema import POOL, ModelConfig
from enginehouse.config.tree import Entry, Fields, Items, Node, Scalar, Value

MAX_DEPTH = 100
_TOKEN = re.compile(
    r"""(?P<space>[\s]+|\#[^\n]*)
    |(?P<string>"(?:[^"\\\n]|\\[^\n])*"|'(?:[^'\\\n]|\\[^\n])*')
    |(?P<number>(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[fF]?)(?![\w.]))
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<symbol>[{}<>\[\]:,;-])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{1,2}|[0-7]{1,3}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_SIMPLE_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}
_CLOSING = {"{": "}", "<": ">"}


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str
    position: Position

    def __str__(self) -> str:
        return f"'{self.text}'" if self.kind != "end" else "the end of the file"


def read_tree(text: str, source: str = "") -> Fields:
    """The tree of a config.pbtxt. Raises ConfigError."""
    return _Parser(text, source).root()


def print_text(config: ModelConfig) -> str:
    """The config as a config.pbtxt."""
    return text_format.MessageToString(config, as_utf8=True, use_index_order=True, descriptor_pool=POOL)


def _tokens(text: str, source: str) -> Iterator[Token]:
    offset, line, line_start = 0, 1, 0
    while offset < len(text):
        position = Position(source, line, offset - line_start + 1)
        match = _TOKEN.match(text, offset)
        if match is None:
            raise _bad_character(text, offset, position)
        kind, word = str(match.lastgroup), match.group()
        if kind != "space":
            yield Token(kind, word, position)
        elif "\n" in word:
            line += word.count("\n")
            line_start = offset + word.rindex("\n") + 1
        offset = match.end()
    yield Token("end", "", Position(source, line, offset - line_start + 1))


def _bad_character(text: str, offset: int, position: Position) -> ConfigError:
    rest = text[offset:].split("\n", 1)[0]
    if placeholder := re.match(r"\$\{?\w+\}?", rest):
        return ConfigError(f"found the placeholder {placeholder.group()}, which nobody filled in", position)
    if rest[0] in "\"'":
        return ConfigError(f"found a text that doesn't end in its line: {rest[:40]}", position)
    if number := re.match(r"[\w.]+", rest):
        return ConfigError(f"found '{number.group()}'", position, allowed="a number")
    return ConfigError(f"found '{rest[0]}'", position, allowed="a field, a value or a closing bracket")


class _Parser:
    def __init__(self, text: str, source: str) -> None:
        self._stream = _tokens(text, source)
        self._token = next(self._stream)
        self._depth = 0

    def root(self) -> Fields:
        fields = Fields(self._token.position)
        while self._token.kind != "end":
            self._entry(fields)
        return fields

    def _next(self) -> Token:
        token = self._token
        if token.kind != "end":
            self._token = next(self._stream)
        return token

    def _accept(self, *symbols: str) -> bool:
        if self._token.kind == "symbol" and self._token.text in symbols:
            self._next()
            return True
        return False

    def _entry(self, fields: Fields) -> None:
        name = self._next()
        if name.kind != "name":
            raise ConfigError(f"found {name}", name.position, allowed="a field's name")
        has_colon = self._accept(":")
        if not has_colon and not (self._token.kind == "symbol" and self._token.text in "{<["):
            raise ConfigError(f"found {self._token}", self._token.position, field=name.text, allowed="':'")
        fields.entries.append(Entry(name.text, self._value(name.text), name.position))
        self._accept(",", ";")

    def _value(self, field: str) -> Node:
        token = self._token
        if token.kind == "string":
            return self._string()
        if token.kind == "symbol" and token.text in _CLOSING:
            return self._object(field)
        if token.kind == "symbol" and token.text == "[":
            return self._list(field)
        return self._scalar(field)

    def _object(self, field: str) -> Fields:
        opening = self._next()
        self._enter(opening)
        closing = _CLOSING[opening.text]
        fields = Fields(opening.position)
        while not self._accept(closing):
            if self._token.kind == "end" or (self._token.kind == "symbol" and self._token.text in "}>]"):
                raise self._unclosed(opening, field, closing)
            self._entry(fields)
        self._depth -= 1
        return fields

    def _list(self, field: str) -> Items:
        opening = self._next()
        self._enter(opening)
        items = Items([], opening.position)
        while not self._accept("]"):
            if items.nodes and not self._accept(","):
                raise self._unclosed(opening, field, "]", "',' or ")
            if self._token.kind == "end":
                raise self._unclosed(opening, field, "]")
            if items.nodes and self._accept("]"):  # a comma after the last one
                break
            items.nodes.append(self._value(field))
        self._depth -= 1
        return items

    def _enter(self, opening: Token) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ConfigError(f"nested deeper than {MAX_DEPTH}", opening.position)

    def _unclosed(self, opening: Token, field: str, closing: str, before: str = "") -> ConfigError:
        return ConfigError(
            f"found {self._token} where the '{opening.text}' of line {opening.position.line} is still open",
            self._token.position,
            field=field,
            allowed=f"{before}'{closing}'",
        )

    def _string(self) -> Scalar:
        start = self._token.position
        parts = []
        while self._token.kind == "string":
            token = self._next()
            parts.append(_unescape(token))
        try:
            text = b"".join(parts).decode()
        except UnicodeDecodeError:
            raise ConfigError("found a text that is not UTF-8", start) from None
        return Scalar(text, text, start, quoted=True)

    def _scalar(self, field: str) -> Scalar:
        start = self._token.position
        sign = "-" if self._accept("-") else ""
        token = self._next()
        if token.kind == "number":
            return Scalar(_number(sign, token), sign + token.text, start)
        if token.kind == "name":
            return Scalar(sign + token.text, sign + token.text, start)
        raise ConfigError(f"found {token}", token.position, field=field, allowed="a value")


def _number(sign: str, token: Token) -> Value:
    word = token.text.lower()
    if word.startswith("0x"):
        return int(sign + word, 16)
    if word.isdigit():
        is_octal = len(word) > 1 and word[0] == "0"
        if is_octal and not set(word) <= set("01234567"):
            allowed = "a number; 0 begins an octal one"
            raise ConfigError(f"found '{token.text}'", token.position, allowed=allowed)
        return int(sign + word, 8 if is_octal else 10)
    return float(sign + word.removesuffix("f"))


def _unescape(token: Token) -> bytes:
    raw = token.text[1:-1].encode()

    def value(match: re.Match[bytes]) -> bytes:
        code: bytes = match.group(1)
        if code[:1] == b"x" and len(code) > 1:
            return bytes([int(code[1:], 16)])
        if code[:1] in (b"u", b"U") and len(code) > 1:
            try:
                return chr(int(code[1:], 16)).encode()
            except (ValueError, UnicodeEncodeError):
                raise ConfigError(f"found the escape \\{code.decode()}", token.position) from None
        if code[:1].isdigit():
            return bytes([int(code, 8) & 0xFF])
        if code in _SIMPLE_ESCAPES:
            return _SIMPLE_ESCAPES[code]
        if code in (b"\\", b"'", b'"', b"?"):
            return code
        raise ConfigError(f"found the escape \\{code.decode(errors='replace')}", token.position)

    return _ESCAPE.sub(value, raw)
