"""Renders a conversation with a model's chat template (Jinja, as Hugging Face tokenizers carry it).

Templates come from strangers: they run in Jinja's sandbox and see nothing but the conversation.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from enginehouse.errors import InvalidArgument
from enginehouse.types import ChatPrompt
from enginehouse_backends.llm.tokenizer import Tokenizer

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_SEES_PARTS = re.compile(r"is string|is iterable|\.type\b|\[['\"]type['\"]\]|image")
"""Marks of templates that expect `content` to be a list of parts."""


class ChatTemplate:
    """A tokenizer's template and special tokens."""

    def __init__(self, tokenizer: Tokenizer, folder: Path, override: str = "") -> None:
        """`override` is a template, or the path of one."""
        self._specials = {name: tokenizer.special_token(name) for name in _SPECIAL_TOKENS}
        self._source = _read_override(override, folder) if override else _own_template(tokenizer, folder)
        self._compiled: dict[str, jinja2.Template] = {}

    @property
    def exists(self) -> bool:
        return bool(self._source)

    def render(self, chat: ChatPrompt) -> str:
        """The prompt's text. Raises InvalidArgument for messages that the template can't take."""
        source = chat.chat_template or self._source
        if not source:
            raise InvalidArgument(
                "the model has no chat template; send a plain prompt, or set `chat_template` in its config"
            )
        if not chat.messages:
            raise InvalidArgument("'messages' must hold at least one message")
        if chat.add_generation_prompt and chat.continue_final_message:
            raise InvalidArgument("'add_generation_prompt' and 'continue_final_message' can't both be true")
        messages = [_plain_message(message, bool(_SEES_PARTS.search(source))) for message in chat.messages]
        text = self._render(source, chat, messages)
        return _cut_after_final(text, messages[-1]) if chat.continue_final_message else text

    def _render(self, source: str, chat: ChatPrompt, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            if source not in self._compiled:
                if len(self._compiled) > 32:
                    self._compiled.clear()
                self._compiled[source] = _ENVIRONMENT.from_string(source)
            return self._compiled[source].render(
                **{
                    **self._specials,
                    "messages": messages,
                    "tools": chat.tools,
                    "documents": chat.documents,
                    "add_generation_prompt": chat.add_generation_prompt,
                    **chat.template_arguments,
                }
            )
        except jinja2.TemplateSyntaxError as error:
            raise InvalidArgument(f"the chat template has an error in line {error.lineno}: {error}") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise InvalidArgument(f"the chat template refuses the messages: {error}") from error


def _own_template(tokenizer: Tokenizer, folder: Path) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    template = tokenizer.settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default") or next(iter(named.values()), None)
    return str(template or "")


def _read_override(override: str, folder: Path) -> str:
    if "{" in override or "\n" in override:
        return override
    for path in (folder / override, Path(override)):
        if path.is_file():
            return path.read_text("utf-8")
    raise InvalidArgument(f"chat_template: there is no file '{override}', and it is no template either")


def _plain_message(message: Mapping[str, Any], keep_parts: bool) -> dict[str, Any]:
    """With text parts joined where the template wants a string."""
    plain = dict(message)
    content = message.get("content")
    if isinstance(content, list | tuple):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") not in _TEXT_PARTS:
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise InvalidArgument(f"content of type '{kind}' is not supported: this model takes text")
        if not keep_parts:
            plain["content"] = "\n".join(str(part.get("text") or "") for part in content)
    if "tool_calls" in plain:
        plain["tool_calls"] = [_parsed_call(call) for call in plain["tool_calls"] or ()]
    return plain


def _parsed_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """With the arguments as an object: templates print them with tojson."""
    function = dict(call.get("function") or {})
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except json.JSONDecodeError:
            pass  # what a model wrote need not be JSON: the template shows it as it is
    return {**call, "function": function}


def _cut_after_final(text: str, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = content[-1].get("text") if content else ""
    final = str(content or "").strip()
    at = text.rfind(final)
    if not final or at < 0:
        raise InvalidArgument("'continue_final_message' is set, but the final message's text is not in the prompt")
    return text[: at + len(final)]


class _GenerationBlocks(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks an assistant's words for training; here it only passes."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **settings: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **settings)


def _now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


def _make_environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
    )
    filters: dict[str, Callable[..., Any]] = environment.filters
    filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_now)
    return environment


_ENVIRONMENT = _make_environment()
