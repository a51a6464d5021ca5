"""From a request to a generation: renders the chat, tokenizes, checks lengths and ids, fills in defaults.

Runs beside the engine's thread, never in it. Everything that can be wrong with a request is found here.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

from enginehouse.errors import InvalidArgument, ResourceExhausted, Unsupported
from enginehouse.types import ChatPrompt, GenerateRequest, GenerateTask, TokenEvent
from enginehouse_backends.llm.block_pool import root_hash
from enginehouse_backends.llm.chat import ChatTemplate
from enginehouse_backends.llm.generation import Generation
from enginehouse_backends.llm.sampling_checks import check_sampling
from enginehouse_backends.llm.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """Of one served model."""

    vocab_size: int
    max_model_len: int
    """Prompt and output together."""
    eos_token_ids: frozenset[int]


@dataclass(slots=True)
class Preparer:
    """See module. Used by several threads at once."""

    model_name: str
    limits: PromptLimits
    tokenizer: Tokenizer | None
    """None where the folder has none: prompts must be token ids, answers are token ids."""
    chat: ChatTemplate | None

    def prepare(self, request: GenerateRequest, most_tokens: int) -> Generation:
        """`most_tokens`: what the KV memory can hold of one sequence. Raises InvalidArgument and others."""
        if request.adapter:
            raise Unsupported(f"model '{self.model_name}' has no adapter '{request.adapter}'")
        sampling = request.sampling
        check_sampling(sampling, self.limits.vocab_size)
        if self.tokenizer is None and (sampling.stop or sampling.bad_words):
            raise InvalidArgument(f"model '{self.model_name}' has no tokenizer: 'stop' and 'bad_words' need one")
        tokens = self._prompt_tokens(request)
        max_total = self._max_total(len(tokens), request, most_tokens)
        eos = frozenset() if sampling.ignore_eos else self.limits.eos_token_ids
        seed = sampling.seed if sampling.seed is not None else random.getrandbits(64)
        if sampling.top_k < 0:
            sampling = replace(sampling, top_k=0)
        return Generation(
            id=request.id,
            tokens=array("i", tokens),
            num_prompt=len(tokens),
            sampling=sampling,
            max_total=max_total,
            seed=seed,
            priority=request.priority,
            tenant=request.tenant,
            deadline_ns=request.deadline_ns,
            root=root_hash(self.model_name, request.adapter, request.cache_salt),
            stop_token_ids=eos | frozenset(sampling.stop_token_ids),
            bad_word_ids=self._bad_word_ids(sampling.bad_words),
        )

    def answer_text_task(self, request: GenerateRequest) -> TokenEvent:
        """For the tasks that need no model: the one event that answers."""
        if self.tokenizer is None:
            raise InvalidArgument(f"model '{self.model_name}' has no tokenizer")
        if request.task is GenerateTask.DETOKENIZE:
            ids = self._checked_ids(request.prompt)
            return TokenEvent(request.id, text=self.tokenizer.decode(ids, request.sampling.skip_special_tokens))
        text = self.prompt_text(request)
        ids = list(self._prompt_tokens(request, may_be_empty=True))
        return TokenEvent(request.id, num_prompt_tokens=len(ids), prompt_token_ids=ids, prompt_text=text)

    def prompt_text(self, request: GenerateRequest) -> str | None:
        """The prompt as text, after the chat template; None if it can't be told."""
        if isinstance(request.prompt, ChatPrompt):
            return self._render(request.prompt)
        if isinstance(request.prompt, str):
            return request.prompt
        return None if self.tokenizer is None else self.tokenizer.decode(request.prompt, skip_special_tokens=False)

    def _prompt_tokens(self, request: GenerateRequest, may_be_empty: bool = False) -> Sequence[int]:
        prompt = request.prompt
        if isinstance(prompt, ChatPrompt):
            # the template writes the special tokens itself
            tokens: Sequence[int] = self._encode(self._render(prompt), add_special_tokens=False)
        elif isinstance(prompt, str):
            tokens = self._encode(prompt, request.add_special_tokens)
        else:
            tokens = self._checked_ids(prompt)
        if not tokens and not may_be_empty:
            raise InvalidArgument("the prompt is empty: it must have at least one token")
        return self._truncated(tokens, request)

    def _truncated(self, tokens: Sequence[int], request: GenerateRequest) -> Sequence[int]:
        keep = request.truncate_prompt_tokens
        if keep is None:
            return tokens
        if keep == -1:
            keep = self.limits.max_model_len - (request.sampling.max_tokens or 1)
        if not 1 <= keep <= self.limits.max_model_len:
            raise InvalidArgument(
                f"'truncate_prompt_tokens' must be -1 or between 1 and {self.limits.max_model_len}, found {keep}"
            )
        return tokens[-keep:]

    def _render(self, chat: ChatPrompt) -> str:
        if self.chat is None:
            raise InvalidArgument(f"model '{self.model_name}' has no tokenizer, so it can't chat; send token ids")
        return self.chat.render(chat)

    def _encode(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        if self.tokenizer is None:
            raise InvalidArgument(f"model '{self.model_name}' has no tokenizer: send the prompt as token ids")
        return self.tokenizer.encode(text, add_special_tokens)

    def _checked_ids(self, prompt: object) -> Sequence[int]:
        if not isinstance(prompt, Sequence) or isinstance(prompt, str):
            raise InvalidArgument("a list of token ids is wanted")
        most = self.limits.vocab_size - 1
        try:
            ids = array("q", prompt)
        except (TypeError, OverflowError) as error:
            raise InvalidArgument(f"the prompt must be text or token ids: {error}") from None
        if ids and not (min(ids) >= 0 and max(ids) <= most):
            wrong = next(token_id for token_id in ids if not 0 <= token_id <= most)
            raise InvalidArgument(f"the prompt has token id {wrong}, the vocabulary has ids 0 to {most}")
        return ids

    def _max_total(self, num_prompt: int, request: GenerateRequest, most_tokens: int) -> int:
        context, wanted = self.limits.max_model_len, request.sampling.max_tokens
        if num_prompt >= context:
            raise InvalidArgument(
                f"the prompt has {num_prompt} tokens, and the model's context of {context} must hold it and at "
                f"least one more"
            )
        if num_prompt + (wanted or 1) > context:
            raise InvalidArgument(
                f"the model's context is {context} tokens, and {num_prompt + (wanted or 1)} were asked for: "
                f"{num_prompt} in the prompt and {wanted} to generate. Shorten the prompt or lower max_tokens"
            )
        total = num_prompt + wanted if wanted is not None else min(context, max(most_tokens, num_prompt + 1))
        if total > most_tokens:
            raise ResourceExhausted(
                f"{total} tokens need more KV memory than model '{self.model_name}' has: it holds {most_tokens} "
                f"tokens of one sequence"
            )
        return total

    def _bad_word_ids(self, words: Sequence[str]) -> Sequence[Sequence[int]]:
        """Each word as it begins a text and as it follows a space."""
        if self.tokenizer is None or not words:
            return ()
        spelled = [self.tokenizer.encode(form, False) for word in words for form in (word, f" {word.lstrip()}")]
        return [ids for ids in spelled if ids]
