"""How the example language model comes about: a small Llama that has read Python's own documentation.

Its text is what `help()` shows of the language (`pydoc_data`, part of every Python), so nothing is downloaded. Seeds
are fixed. A third of a million parameters and a few seconds of training give sentences, not knowledge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SEED = 20240229
VOCABULARY = 768
CONTEXT = 512
STEPS, BATCH, LENGTH = 300, 12, 96
WORST_LOSS = 4.0
"""Nats a token of the training text; one that knows only how often each token comes has 5.6."""
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{% if message.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_language_model(directory: Path) -> None:
    """A Hugging Face folder: config, weights, tokenizer with a chat template."""
    import torch
    import transformers

    documents = _conversations()
    tokenizer = _train_tokenizer(documents)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=None, eos_token_id=tokenizer.token_to_id(END), pad_token_id=tokenizer.token_to_id(END),
    )  # fmt: skip
    torch.manual_seed(SEED)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    _fit(model, [torch.tensor(tokenizer.encode(document).ids) for document in documents])
    model.save_pretrained(directory)
    wrapped: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, chat_template=CHAT_TEMPLATE
    )
    wrapped.save_pretrained(directory)


def _conversations() -> list[str]:
    from pydoc_data.topics import topics

    return [f"{USER}Explain {topic}{ASSISTANT}{text.strip()}{END}" for topic, text in sorted(topics.items())]


def _train_tokenizer(documents: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _fit(model: Any, documents: list[Any]) -> None:
    """Trains on windows of all documents, every fourth from the beginning of one, so that answers begin as such."""
    import torch

    text = torch.cat(documents)
    beginnings = torch.tensor([0, *(len(document) for document in documents[:-1])]).cumsum(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS, pct_start=0.1)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the steps are small: a second thread only waits
    losses = []
    for _ in range(STEPS):
        first = beginnings[torch.randint(0, len(beginnings), (BATCH // 4,))]
        any_place = torch.randint(0, len(text), (BATCH - BATCH // 4,))
        starts = torch.cat([first, any_place]).clamp(max=len(text) - LENGTH)
        batch = torch.stack([text[start : start + LENGTH] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    torch.set_num_threads(num_threads)
    reached = sum(losses[-20:]) / 20
    if reached > WORST_LOSS:
        raise SystemExit(f"the language model's loss is {reached:.2f} nats a token, over {WORST_LOSS}: retrain")
