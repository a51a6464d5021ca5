"""Text to token ids and back, with `tokenizers` alone: torch and transformers are not needed for it.

Decoding is incremental and exact: what is given out piece by piece, joined, is what decoding all ids at once
gives, also where a character's bytes come in several tokens.
"""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from enginehouse.errors import InvalidArgument, NotFound

_CONTEXT_TOKENS = 6
"""Of the prompt, for decoders that look at what came before."""


class Tokenizer:
    """A model's tokenizer, from the tokenizer.json of its folder. Used by several threads."""

    def __init__(self, folder: Path) -> None:
        """Raises NotFound without a tokenizer, InvalidArgument for a broken one."""
        self._inner = _read_tokenizer(folder)
        self._inner.no_padding()
        self._inner.no_truncation()
        self.settings: Mapping[str, Any] = _read_settings(folder / "tokenizer_config.json")
        added = self._inner.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = self._inner.get_vocab_size(with_added_tokens=True)
        self._bytes = _byte_table(self._inner)
        """By token id, where every token stands for fixed bytes; else None."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._inner.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, token: str) -> int | None:
        found: int | None = self._inner.token_to_id(token)
        return found

    def special_token(self, name: str) -> str:
        """The text of bos_token, eos_token, …; "" if there is none."""
        token = self.settings.get(name)
        return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for; may be a part of a character."""
        if self._bytes is not None:
            return self._bytes[token_id] if token_id < len(self._bytes) else b""
        token = self._inner.id_to_token(token_id) or ""
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def stream(self, prompt: Sequence[int], skip_special_tokens: bool) -> TokenStream:
        """Decodes tokens that come after `prompt`."""
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        if self._bytes is not None:
            return _ByteStream(self._bytes, skipped)
        return _DecoderStream(self._inner, prompt[-_CONTEXT_TOKENS:], skip_special_tokens)


class TokenStream(ABC):
    """Text of tokens as they come."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """The text that is certain now; "" inside a character."""

    @abstractmethod
    def finish(self) -> str:
        """What an unfinished character at the end leaves."""


class _ByteStream(TokenStream):
    """For byte-level vocabularies: look the bytes up, and let a UTF-8 decoder hold back what is incomplete."""

    def __init__(self, table: Sequence[bytes], skipped: frozenset[int]) -> None:
        self._table, self._skipped = table, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped or token_id >= len(self._table):
            return ""
        return self._decoder.decode(self._table[token_id])

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _DecoderStream(TokenStream):
    """For all others: the tokenizer's own decoder over a sliding window."""

    def __init__(self, inner: tokenizers.Tokenizer, context: Sequence[int], skip_special_tokens: bool) -> None:
        self._inner, self._skip = inner, skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []
        for token_id in context:
            self._stream.step(inner, token_id)

    def push(self, token_id: int) -> str:
        text: str | None = self._stream.step(self._inner, token_id)
        if text is None:
            self._pending.append(token_id)
            return ""
        self._pending.clear()
        return text

    def finish(self) -> str:
        if not self._pending:
            return ""
        text: str = self._inner.decode(self._pending, skip_special_tokens=self._skip)
        return text if text.endswith("\ufffd") else ""


def _read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _convert_slow_tokenizer(folder)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InvalidArgument(f"{path} is no tokenizer: {error}") from error


def _convert_slow_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """From sentencepiece and other older files, by transformers."""
    if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "spiece.model")):
        raise NotFound(f"{folder} has no tokenizer: tokenizer.json is missing")
    import transformers

    auto: Any = transformers.AutoTokenizer
    try:
        converted: tokenizers.Tokenizer = auto.from_pretrained(folder, use_fast=True).backend_tokenizer
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise InvalidArgument(f"{folder}: its tokenizer can't be read: {error}") from error
    return converted


def _read_settings(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidArgument(f"{path} is no JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _byte_table(inner: tokenizers.Tokenizer) -> list[bytes] | None:
    """Bytes of each token of a vocabulary whose decoder is ByteLevel alone; None for others."""
    decoder = json.loads(inner.to_str()).get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        return None
    byte_by_character = _byte_level_alphabet()
    table = [b""] * (max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1)
    for token, token_id in inner.get_vocab(with_added_tokens=True).items():
        try:
            table[token_id] = bytes([byte_by_character[character] for character in token])
        except KeyError:
            table[token_id] = token.encode()  # an added token with characters outside the alphabet
    return table


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
