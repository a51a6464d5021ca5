"""Text out of tokens, stop strings, chat templates: exact, whatever the pieces are."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from enginehouse.errors import InvalidArgument, NotFound
from enginehouse.types import ChatPrompt
from enginehouse_backends.llm.chat import ChatTemplate
from enginehouse_backends.llm.stop_strings import StopStrings
from enginehouse_backends.llm.tokenizer import Tokenizer

TEXT = "Grüße, 世界! 👩‍👩‍👧‍👦 naïve — Привет ﷽ \U0001f9d1\U0001f3fd‍\U0001f680 x²"


def byte_level() -> tokenizers.Tokenizer:
    """Every byte is a token, and so are some pairs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    pairs = [(alphabet[i], alphabet[j]) for i in range(0, 250, 3) for j in range(1, 250, 7)]
    vocab |= {a + b: len(vocab) + index for index, (a, b) in enumerate(pairs)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|end|>"])
    return inner


def byte_fallback() -> tokenizers.Tokenizer:
    """Like sentencepiece's: words begin with ▁, what is unknown falls back to bytes."""
    vocab = {"<unk>": 0, "▁": 1, "▁a": 2, "b": 3, "▁ab": 4, "a": 5}
    vocab |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁a", "b")], byte_fallback=True, unk_token="<unk>")
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<|end|>"])
    return inner


def load(inner: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    inner.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_pieces_joined_are_the_whole(make: Callable[[], tokenizers.Tokenizer], tmp_path: Path) -> None:
    tokenizer = load(make(), tmp_path)
    ids = tokenizer.encode(TEXT)
    stream = tokenizer.stream([], skip_special_tokens=True)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids) == TEXT
    assert "" in pieces, "some token ends inside a character"
    assert not any("\ufffd" in piece for piece in pieces)


def test_random_bytes_decode_like_the_library(tmp_path: Path) -> None:
    tokenizer, source = load(byte_level(), tmp_path), random.Random(1)
    for _ in range(300):
        ids = [source.randrange(tokenizer.vocab_size) for _ in range(source.randint(1, 40))]
        stream = tokenizer.stream([], skip_special_tokens=True)
        assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


def test_a_cut_character_is_told_at_the_end(tmp_path: Path) -> None:
    tokenizer = load(byte_level(), tmp_path)
    ids = [tokenizer.encode(part)[0] for part in ("a",)] + tokenizer.encode("世")[:-1]
    stream = tokenizer.stream([], skip_special_tokens=True)
    assert [stream.push(token_id) for token_id in ids] == ["a", "", ""]
    assert stream.finish() == "\ufffd"


def test_the_space_before_the_first_word_stays_after_a_prompt(tmp_path: Path) -> None:
    tokenizer = load(byte_fallback(), tmp_path)
    prompt = tokenizer.encode("ab")
    stream = tokenizer.stream(prompt, skip_special_tokens=True)
    assert stream.push(tokenizer.encode("ab")[0]) == " ab"


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_special_tokens_are_skipped_or_shown(make: Callable[[], tokenizers.Tokenizer], tmp_path: Path) -> None:
    tokenizer = load(make(), tmp_path)
    end = tokenizer.token_id("<|end|>")
    assert end is not None
    assert tokenizer.stream([], skip_special_tokens=True).push(end) == ""
    assert tokenizer.stream([], skip_special_tokens=False).push(end) == "<|end|>"


def test_token_bytes_are_parts_of_characters(tmp_path: Path) -> None:
    for make in (byte_level, byte_fallback):
        tokenizer = load(make(), tmp_path)
        ids = tokenizer.encode("世")
        assert b"".join(map(tokenizer.token_bytes, ids)).lstrip() == "世".encode()


def test_a_folder_without_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidArgument, match="is no tokenizer"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("pieces", "stops", "expected", "found"),
    [
        (["hel", "lo wor", "ld"], ["wor"], "hello ", "wor"),
        (["a", "b", "c", "d"], ["bc"], "a", "bc"),
        (["abab", "ac"], ["abac"], "ab", "abac"),
        (["no", "thing"], ["xyz"], "nothing", None),
        (["x ends with wo"], ["wor"], "x ends with wo", None),
        (["both b and a"], ["a", "b"], "", "b"),
        (["one two"], ["two", "one two"], "", "one two"),
    ],
)
def test_stop_strings_are_found_across_pieces(
    pieces: list[str], stops: list[str], expected: str, found: str | None
) -> None:
    watch, text = StopStrings(stops), ""
    for piece in pieces:
        text += watch.push(piece)
        if watch.found:
            break
    else:
        text += watch.finish()
    assert (text, watch.found) == (expected, found)


def test_nothing_of_a_stop_string_is_given_out_early() -> None:
    watch = StopStrings(["STOP"])
    assert [watch.push(piece) for piece in ("a S", "TO", "X ST")] == ["a ", "", "STOX "]


def test_stop_strings_may_be_included_and_may_be_too_early() -> None:
    watch = StopStrings(["ab"], include=True)
    assert watch.push("xaby") == "xab"
    early = StopStrings(["ab"])
    assert early.push("xaby", may_stop=False) == "xaby"
    assert early.found is None


def random_stop_case(source: random.Random) -> tuple[str, list[str]]:
    text = "".join(source.choice("ab") for _ in range(source.randint(1, 30)))
    stops = ["".join(source.choice("ab") for _ in range(source.randint(1, 5))) for _ in range(source.randint(1, 3))]
    return text, stops


def test_stopping_piece_by_piece_is_stopping_at_once() -> None:
    source = random.Random(2)
    for _ in range(3000):
        text, stops = random_stop_case(source)
        watch, out, rest = StopStrings(stops), "", text
        while rest:
            size = source.randint(1, 4)
            out, rest = out + watch.push(rest[:size]), rest[size:]
            if watch.found is not None:
                break
        else:
            out += watch.finish()
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        if not ends:
            assert (out, watch.found) == (text, None)
        else:  # the stop string that is complete first; of two that end together, the longer one
            assert out == text[: min(ends)[1]]


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_template(folder: Path, template: str = CHATML, **settings: Any) -> ChatTemplate:
    tokenizer = load(byte_level(), folder)
    tokenizer.settings = {"bos_token": {"content": "<s>"}, **settings}
    return ChatTemplate(tokenizer, folder, template)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_messages_are_rendered(tmp_path: Path) -> None:
    template = chat_template(tmp_path)
    assert template.render(ChatPrompt([user("hi")])) == "<|user|>hi\n<|assistant|>"
    assert template.render(ChatPrompt([user("hi")], add_generation_prompt=False)) == "<|user|>hi\n"


def test_the_final_message_can_be_continued(tmp_path: Path) -> None:
    chat = ChatPrompt(
        [user("hi"), {"role": "assistant", "content": "I am "}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert chat_template(tmp_path).render(chat) == "<|user|>hi\n<|assistant|>I am"


def test_text_parts_are_joined_unless_the_template_takes_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat_template(tmp_path).render(ChatPrompt([user(parts)])) == "<|user|>a\nb\n<|assistant|>"
    takes_parts = (
        "{% for p in messages[0]['content'] %}{% if p['type'] == 'text' %}[{{ p['text'] }}]{% endif %}{% endfor %}"
    )
    assert chat_template(tmp_path, takes_parts).render(ChatPrompt([user(parts)])) == "[a][b]"


def test_templates_see_special_tokens_tools_and_arguments(tmp_path: Path) -> None:
    template = chat_template(
        tmp_path, "{{ bos_token }}{{ tools | tojson }}{{ mood }}{% generation %}x{% endgeneration %}"
    )
    chat = ChatPrompt([user("é")], tools=[{"name": "é"}], template_arguments={"mood": "glad"})
    assert template.render(chat) == '<s>[{"name": "é"}]gladx'


def test_arguments_of_tool_calls_are_objects(tmp_path: Path) -> None:
    template = chat_template(tmp_path, "{{ messages[0].tool_calls[0].function.arguments.city }}")
    call = {"function": {"name": "f", "arguments": '{"city": "Rome"}'}}
    assert template.render(ChatPrompt([{"role": "assistant", "content": None, "tool_calls": [call]}])) == "Rome"


@pytest.mark.parametrize(
    ("template", "chat", "text"),
    [
        ("", ChatPrompt([user("hi")]), "has no chat template"),
        (CHATML, ChatPrompt([]), "at least one message"),
        (CHATML, ChatPrompt([user([{"type": "image_url"}])]), "content of type 'image_url' is not supported"),
        ("{% if %}", ChatPrompt([user("hi")]), "error in line 1"),
        ("{{ raise_exception('roles must alternate') }}", ChatPrompt([user("hi")]), "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", ChatPrompt([user("hi")]), "refuses the messages"),
        ("{{ 1 / 0 }}", ChatPrompt([user("hi")]), "refuses the messages: division by zero"),
        ("{{ range(10 ** 9) }}", ChatPrompt([user("hi")]), "refuses the messages: Range too big"),
        (CHATML, ChatPrompt([user("hi")], continue_final_message=True), "can't both be true"),
    ],
)
def test_chats_that_cannot_be_are_refused(template: str, chat: ChatPrompt, text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=text):
        chat_template(tmp_path, template).render(chat)


def test_the_templates_places_in_a_folder(tmp_path: Path) -> None:
    tokenizer = load(byte_level(), tmp_path)
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    tokenizer.settings = {"chat_template": named}
    assert ChatTemplate(tokenizer, tmp_path).render(ChatPrompt([user("hi")])) == "plain"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate(tokenizer, tmp_path).render(ChatPrompt([user("hi")])) == "file"
    with pytest.raises(InvalidArgument, match="there is no file"):
        ChatTemplate(tokenizer, tmp_path, "missing.jinja")
