"""What goes back for a generation: sampled tokens become text, stop conditions are met, events are made.

Pure but for the tokenizer that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence

from enginehouse.errors import EnginehouseError
from enginehouse.types import FinishReason, TokenEvent, TokenLogprob
from enginehouse_backends.llm.generation import Generation
from enginehouse_backends.llm.pooling import PooledText, PoolingSettings, Vector
from enginehouse_backends.llm.runner import RowLogprobs
from enginehouse_backends.llm.stop_strings import StopStrings
from enginehouse_backends.llm.tokenizer import Tokenizer, TokenStream


class Answer:
    """One generation's way out. The engine's thread owns it; `take` is called for each sampled token."""

    __slots__ = (
        "_eos",
        "_event",
        "_logprobs",
        "_pooled",
        "_prompt_logprobs",
        "_stops",
        "_stream",
        "_streaming",
        "_tokenizer",
        "finish_reason",
        "first_token_ns",
        "generation",
        "last_token_ns",
        "prompt_text",
        "return_prompt",
    )

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        streaming: bool,
        return_prompt: bool = False,
        prompt_text: str | None = None,
        pooling: PoolingSettings | None = None,
    ) -> None:
        sampling = generation.sampling
        self.generation = generation
        self.return_prompt, self.prompt_text = return_prompt, prompt_text
        self.finish_reason: FinishReason | None = None
        self.first_token_ns = self.last_token_ns = 0
        self._tokenizer, self._eos, self._streaming = tokenizer, eos_token_ids, streaming
        self._stream: TokenStream | None = None
        if tokenizer is not None and sampling.detokenize:
            self._stream = tokenizer.stream(generation.tokens, sampling.skip_special_tokens)
        self._stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output) if sampling.stop else None
        self._logprobs: list[Sequence[TokenLogprob]] = []
        self._prompt_logprobs: list[Sequence[TokenLogprob] | None] = [None]
        self._pooled = PooledText(pooling, generation.num_prompt) if pooling is not None else None
        self._event: TokenEvent | None = None
        """What has gathered and not been sent."""

    def take(self, token_id: int, row: RowLogprobs | None, now_ns: int) -> TokenEvent | None:
        """Appends the token to the generation. Gives the event to send now; the last one says why it ends."""
        generation = self.generation
        generation.tokens.append(token_id)
        if not self.first_token_ns:
            self.first_token_ns = now_ns
        self.last_token_ns = now_ns
        may_stop = generation.num_output >= generation.sampling.min_tokens
        stop_reason: int | str | None = None
        if token_id in generation.stop_token_ids and may_stop:
            self.finish_reason = FinishReason.STOP
            stop_reason = None if token_id in self._eos else token_id
        elif len(generation.tokens) >= generation.max_total:
            self.finish_reason = FinishReason.LENGTH
        text = "" if self._stream is None else self._text_of(token_id, may_stop)
        if self._stops is not None and self._stops.found is not None:
            stop_reason = self._stops.found
        event = self._gather(token_id, text, row)
        if self.finish_reason is None:
            return self._take_event() if self._streaming else None
        event.finish_reason, event.stop_reason = self.finish_reason, stop_reason
        return self._take_event()

    def add_vector(self, vector: Vector, is_first: bool) -> None:
        """What a step gave for a text that is embedded; `is_first` where it began with the text's first token."""
        assert self._pooled is not None, "bug: a vector for a text that isn't embedded"
        self._pooled.add(vector, is_first)

    def end_with_vector(self, now_ns: int) -> TokenEvent:
        """The text is embedded: the event that says so."""
        assert self._pooled is not None, "bug: a vector for a text that isn't embedded"
        self.first_token_ns = self.last_token_ns = now_ns
        event = self.end(FinishReason.STOP)
        event.embedding = self._pooled.finish().tobytes()
        return event

    def end(self, reason: FinishReason, error: EnginehouseError | None = None) -> TokenEvent:
        """Ended from outside: cancelled, or failed. What was held back goes along."""
        self.finish_reason = reason
        event = self._event = self._event or self._new_event()
        event.finish_reason, event.error = reason, error
        if self._stops is not None:
            event.text += self._stops.finish()
        return self._take_event()

    def take_prompt_logprobs(self, position: int, row: RowLogprobs) -> None:
        """Of the prompt's token at `position`. A second computation after a preemption is ignored."""
        if position == len(self._prompt_logprobs):
            self._prompt_logprobs.append(self._described(row))

    def _text_of(self, token_id: int, may_stop: bool) -> str:
        assert self._stream is not None, "bug: text is wanted without a tokenizer"
        ended_by_token = self.finish_reason is FinishReason.STOP
        hidden = ended_by_token and not self.generation.sampling.include_stop_str_in_output
        text = "" if hidden else self._stream.push(token_id)
        stops = self._stops
        if stops is None:
            return text if self.finish_reason is None else text + self._stream.finish()
        text = stops.push(text, may_stop and not ended_by_token)
        if stops.found is not None:
            self.finish_reason = FinishReason.STOP
        elif self.finish_reason is not None:
            text += stops.push(self._stream.finish(), may_stop=False) + stops.finish()
        return text

    def _gather(self, token_id: int, text: str, row: RowLogprobs | None) -> TokenEvent:
        event = self._event
        if event is None:
            event = self._event = self._new_event()
            event.token_ids = [token_id]
            event.text = text
        else:
            event.token_ids.append(token_id)  # type: ignore[attr-defined]  # ours, a list
            event.text += text
        event.num_generated_tokens = self.generation.num_output
        if row is not None:
            self._logprobs.append(self._described(row))
        return event

    def _new_event(self) -> TokenEvent:
        generation = self.generation
        event = TokenEvent(generation.id, token_ids=[])
        event.num_prompt_tokens = generation.num_prompt
        event.num_cached_tokens = max(generation.num_cached, 0)
        event.num_generated_tokens = generation.num_output
        if generation.first_scheduled_ns:
            event.queue_s = (generation.first_scheduled_ns - generation.arrived_ns) / 1e9
            if self.first_token_ns:
                event.prefill_s = (self.first_token_ns - generation.first_scheduled_ns) / 1e9
        return event

    def _take_event(self) -> TokenEvent:
        event, self._event = self._event or self._new_event(), None
        if self._logprobs:
            event.logprobs, self._logprobs = self._logprobs, []
        if self.return_prompt:
            event.prompt_token_ids = list(self.generation.tokens[: self.generation.num_prompt])
            event.prompt_text = self.prompt_text
            self.return_prompt = False
        if len(self._prompt_logprobs) > 1:
            event.prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, [None]
        return event

    def _described(self, row: RowLogprobs) -> list[TokenLogprob]:
        """The token itself, then the likeliest in order."""
        first = self._token_logprob(row.token_id, row.logprob, row.rank)
        others = zip(row.top_ids, row.top_logprobs, strict=True)
        return [first, *(self._token_logprob(*other, rank) for rank, other in enumerate(others, start=1))]

    def _token_logprob(self, token_id: int, logprob: float, rank: int) -> TokenLogprob:
        raw = b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)
        return TokenLogprob(token_id, raw.decode("utf-8", "replace"), logprob, rank, raw)
