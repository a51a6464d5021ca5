"""Which groups of the OpenAI API need a secret header. Pure.

`--openai-restricted-api "<group>,<group> <header> <value>"`, or with `:` and `=` as the other flags have it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from enginehouse.errors import InvalidArgument

GROUPS = ("inference", "embedding", "model-repository")
_FORM = re.compile(r"(?P<groups>[a-z,-]+)(?:\s+(?P<key>\S+)\s+(?P<value>\S+)|:(?P<key2>[^=\s]+)=(?P<value2>\S+))")


class RestrictedOpenAIApis:
    def __init__(self, texts: Iterable[str]) -> None:
        """Raises InvalidArgument for a text that is not of the form, and for a group named twice."""
        self._secrets: dict[str, tuple[str, str]] = {}
        for text in texts:
            match = _FORM.fullmatch(text.strip())
            if match is None:
                raise InvalidArgument(
                    f"--openai-restricted-api option format is '<group>,<group> <header> <value>'. Got {text}"
                )
            secret = (match["key"] or match["key2"], match["value"] or match["value2"])
            for group in match["groups"].split(","):
                if group not in GROUPS:
                    raise InvalidArgument(f"Unknown API '{group}' (there are: {', '.join(GROUPS)})")
                if group in self._secrets:
                    raise InvalidArgument(f"restricted api '{group}' can not be specified in multiple config groups")
                self._secrets[group] = secret

    def missing_header(self, group: str, header: Callable[[str], str | None]) -> str | None:
        """The header that this call lacks, or None if it may pass."""
        if group not in self._secrets:
            return None
        name, value = self._secrets[group]
        return None if header(name.lower()) == value else name
