"""Several LLMs in one engine: pages move as load moves, and no token is wrong."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from enginehouse.errors import InvalidArgument
from enginehouse.types import SamplingParameters
from enginehouse_backends.llm.backend import _GROUPS
from tests.acceptance.llm.serving import Serving
from tests.acceptance.llm.small_models import CONFIGS, VOCAB, make_reference, save_reference, save_tokenizer

PAGE_BYTES = 4 << 20
NUM_PAGES_EACH = 3
SAMPLING = SamplingParameters(temperature=0.0, max_tokens=40, ignore_eos=True)


@cache
def reference(name: str) -> Any:
    return make_reference(CONFIGS[name]())


def expected(name: str, prompt: Sequence[int]) -> list[int]:
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = reference(name).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name in ("llama", "qwen3"):
        folders[name] = tmp_path_factory.mktemp(name)
        save_reference(name, folders[name])
    return folders


def serve(folder: Path, name: str) -> Serving:
    return Serving(folder, name, kv_bytes=NUM_PAGES_EACH * PAGE_BYTES, max_num_seqs=256)


def num_pages(serving: Serving) -> int:
    return serving.instance.engine.space.ledger.count(serving.instance.llm.name)


def load(serving: Serving, seed: int, count: int) -> list[tuple[str, list[int]]]:
    """Different prompts of 150 to 200 tokens."""
    source = random.Random(seed)
    prompts = [[source.randrange(VOCAB) for _ in range(source.randint(150, 200))] for _ in range(count)]
    with serving.held():
        return [(serving.submit(prompt, SAMPLING), prompt) for prompt in prompts]


def test_pages_move_with_the_load_and_no_token_is_wrong(folders: dict[str, Path]) -> None:
    servings = {name: serve(folder, name) for name, folder in folders.items()}
    llama, qwen = servings.values()
    assert llama.instance.engine is qwen.instance.engine
    history = []
    for seed, (many, few) in enumerate(((llama, qwen), (qwen, llama), (llama, qwen))):
        requests = [(many, *request) for request in load(many, seed, 90)]
        requests += [(few, *request) for request in load(few, seed, 4)]
        results = [(serving, prompt, serving.result(request_id)) for serving, request_id, prompt in requests]
        history.append((num_pages(llama), num_pages(qwen)))
        for serving, prompt, result in results[::6]:
            assert result.token_ids == expected(serving.config.name, prompt)
    assert history[0][0] > NUM_PAGES_EACH, "llama never had more than its share"
    assert history[1][1] > NUM_PAGES_EACH, "qwen never had more than its share"
    assert history[2][0] > history[1][0], "pages did not come back"
    assert llama.instance.engine.space.num_moved_pages > 0
    for serving in servings.values():
        serving.check()
        serving.close()


def test_a_model_under_its_share_takes_pages_that_are_in_use(folders: dict[str, Path]) -> None:
    llama, qwen = serve(folders["llama"], "llama"), serve(folders["qwen3"], "qwen3")
    llama.instance.llm.scheduler.expected_output = 0.0
    busy = load(llama, 1, 120)
    for request_id, _ in busy[:90]:
        llama.next_event(request_id)
    taken = num_pages(llama)
    late = load(qwen, 2, 30)
    for request_id, prompt in late:
        assert qwen.result(request_id).token_ids == expected("qwen3", prompt)
    for request_id, prompt in busy[90:]:
        assert llama.result(request_id).token_ids == expected("llama", prompt)
    assert taken > NUM_PAGES_EACH, "there was nothing to take"
    for serving in (llama, qwen):
        serving.close()


def test_others_generate_while_a_model_gets_its_memory(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filling a GiB for the first time takes seconds: the engine's thread doesn't wait for it."""
    llama = serve(folders["llama"], "llama")
    arena = llama.instance.engine.arena
    filling, filled = threading.Event(), threading.Event()
    prepare = arena.prepare

    def prepare_slowly(num_pages: int) -> None:
        filling.set()
        assert filled.wait(60), "nobody generated meanwhile"
        prepare(num_pages)

    monkeypatch.setattr(arena, "prepare", prepare_slowly)
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(serve, folders["qwen3"], "qwen3")
        assert filling.wait(60)
        (request_id, prompt), *_ = load(llama, 5, 1)
        assert llama.result(request_id).token_ids == expected("llama", prompt)
        assert not loading.done()
        filled.set()
        qwen = loading.result()
    assert arena.num_pages == 2 * NUM_PAGES_EACH
    for serving in (llama, qwen):
        serving.check()
        serving.close()


def test_a_leaving_model_gives_its_pages_to_the_others(folders: dict[str, Path]) -> None:
    llama, qwen = serve(folders["llama"], "llama"), serve(folders["qwen3"], "qwen3")
    engine = llama.instance.engine
    for request_id, _ in load(qwen, 1, 20):
        qwen.result(request_id)
    unfinished = qwen.submit([1, 2, 3], SAMPLING)
    qwen.close()
    assert "being unloaded" in str(qwen.result(unfinished).last.error)
    assert engine.space.ledger.num_free == 2 * NUM_PAGES_EACH - num_pages(llama)
    for request_id, prompt in load(llama, 3, 20):
        assert llama.result(request_id).token_ids == expected("llama", prompt)
    llama.check()
    llama.close()


def test_a_model_that_cannot_be_loaded_leaves_no_engine_behind(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders["llama"], broken)
    save_tokenizer(broken)
    with pytest.raises(InvalidArgument, match=r"there is no file 'missing\.jinja'"):
        Serving(broken, "llama", kv_bytes=PAGE_BYTES, chat_template="missing.jinja", engine_group="lonely")
    serving = Serving(folders["llama"], "llama", kv_bytes=PAGE_BYTES, engine_group="lonely")
    assert serving.instance.engine._llms.keys() == {serving.instance.llm.name}
    serving.close()
    assert not any(key.startswith("lonely") for key in _GROUPS._groups)
