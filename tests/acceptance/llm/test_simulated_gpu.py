"""LLMs placed on a GPU, from the folder in the repository to tokens at an OpenAI client.

The device is simulated: its runtime, its arena, the GPU runner and the Triton kernels are the real ones, the latter
through Triton's interpreter.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from enginehouse.testing.server import ServerProcess
from tests.acceptance.llm.serving import GREEDY, Serving
from tests.acceptance.llm.small_models import save_reference, save_tokenizer

NUM_TOKENS = 6
PROMPTS = {"llama": [5, 250, 17, 3], "qwen2": list(range(20, 41))}


def greedy(reference: Any, prompt: list[int]) -> list[int]:
    settings = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    with torch.inference_mode():
        ids: list[int] = reference.generate(torch.tensor([prompt]), **settings)[0].tolist()
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def expected(repository: Path) -> dict[str, list[int]]:
    found = {}
    for name, prompt in PROMPTS.items():
        folder = repository / name
        found[name] = greedy(save_reference(name, folder), prompt)
        save_tokenizer(folder)
    (repository / "too-big").mkdir()
    for file in (repository / "llama").iterdir():
        (repository / "too-big" / file.name).symlink_to(file)
    return found


@pytest.fixture(scope="module")
def server(repository: Path, expected: dict[str, list[int]]) -> Iterator[ServerProcess]:
    for name in PROMPTS:
        # without a kind: where there is a GPU an LLM goes there
        text = 'backend: "llm" parameters { key: "gpu_memory_utilization" value { string_value: "0.4" } }'
        (repository / name / "config.pbtxt").write_text(text)
    (repository / "too-big" / "config.pbtxt").write_text('backend: "llm" serving { memory { kv_bytes: 900000000000 } }')
    flags = ["--simulated-device=256MiB", "--model-control-mode=explicit", "--exit-on-error=false"]
    with ServerProcess([repository], [*flags, *(f"--load-model={name}" for name in PROMPTS)]) as running:
        yield running


def memory_lines(server: ServerProcess) -> list[str]:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return [line for line in lines if line.startswith("enginehouse_memory_bytes{")]


def complete(server: ServerProcess, model: str, **fields: Any) -> Any:
    client = openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0, timeout=200)
    fields = {"max_tokens": NUM_TOKENS, "temperature": 0, **fields}
    more = {"return_token_ids": True, "ignore_eos": True}
    return client.completions.create(model=model, prompt=PROMPTS[model], extra_body=more, **fields)


@pytest.mark.timeout(240)
def test_two_llms_on_one_gpu_give_transformers_tokens(server: ServerProcess, expected: dict[str, list[int]]) -> None:
    with ThreadPoolExecutor() as pool:
        answers = dict(zip(PROMPTS, pool.map(lambda name: complete(server, name), PROMPTS), strict=True))
    assert {name: answer.choices[0].token_ids for name, answer in answers.items()} == expected


@pytest.mark.timeout(240)
def test_a_stop_token_ends_it_and_the_surplus_step_shows_nowhere(
    server: ServerProcess, expected: dict[str, list[int]]
) -> None:
    tokens = expected["llama"]
    stop = tokens[2]
    more = {"return_token_ids": True, "stop_token_ids": [stop]}
    client = openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0, timeout=200)
    answer: Any = client.completions.create(
        model="llama", prompt=PROMPTS["llama"], max_tokens=NUM_TOKENS, temperature=0, extra_body=more
    )
    assert answer.choices[0].token_ids == tokens[: tokens.index(stop) + 1]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == tokens.index(stop) + 1


def test_what_does_not_fit_is_refused_with_the_numbers(server: ServerProcess) -> None:
    request = urllib.request.Request(
        f"http://{server.http}/v2/repository/models/too-big/load", data=b"{}", method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=60)
    told = json.loads(refusal.value.read())["error"]
    assert "838.19 GiB for KV on simulated:0" in told
    assert "of 0.25 GiB are free there" in told


@pytest.mark.timeout(240)
def test_memory_that_models_share_grows_and_shrinks_while_one_of_them_generates(
    repository: Path, expected: dict[str, list[int]]
) -> None:
    """The device's memory is allocated anew each time, so what the first has is computed again; nobody notices."""
    first = Serving(repository / "llama", device="simulated:0", kv_bytes=32 << 20, max_model_len=64)
    request = first.submit(PROMPTS["llama"], replace(GREEDY, max_tokens=NUM_TOKENS))
    events = [first.next_event(request)]
    second = Serving(repository / "qwen2", name="n", device="simulated:0", kv_bytes=64 << 20, max_model_len=64)
    assert first.instance.engine.arena.num_pages == 3
    other = second.submit(PROMPTS["qwen2"], replace(GREEDY, max_tokens=2))
    assert second.result(other).token_ids == expected["qwen2"][:2]
    second.close()
    assert first.instance.engine.arena.num_pages == 1
    while events[-1].finish_reason is None:
        events.append(first.next_event(request))
    assert [token for event in events for token in event.token_ids] == expected["llama"]
    assert first.instance.llm.scheduler.num_preemptions >= 1
    assert first.instance.llm.num_overlapped >= 1
    first.check()
    first.close()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_gpus_share_an_llm_and_its_memory(tmp_path: Path) -> None:
    reference = save_reference("llama", tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    config = 'backend: "llm" serving { llm { tensor_parallel_size: 2 max_model_len: 64 max_num_seqs: 4 } }'
    (tmp_path / "llama" / "config.pbtxt").write_text(config)
    with ServerProcess([tmp_path], ["--simulated-device=256MiB", "--simulated-device=256MiB"]) as server:
        found = complete(server, "llama").choices[0].token_ids
        lines = memory_lines(server)
    assert found == greedy(reference, PROMPTS["llama"])
    kv = [line.rpartition(" ")[2] for line in lines if 'kind="kv"' in line]
    assert len(kv) == 2, "one share on each"
    assert kv[0] == kv[1]


def test_the_ledger_has_what_each_model_holds_of_the_gpu(server: ServerProcess) -> None:
    lines = memory_lines(server)
    for model in PROMPTS:
        kinds = [line for line in lines if f'model="{model}"' in line and 'device="simulated:0"' in line]
        assert len(kinds) == 3, "weights, workspace and kv"


def test_the_config_tells_the_device_and_the_memory_that_was_chosen(server: ServerProcess) -> None:
    with urllib.request.urlopen(f"http://{server.http}/v2/models/llama/config", timeout=10) as answer:
        config = json.loads(answer.read())
    [group] = config["instance_group"]
    assert (group["kind"], group["gpus"]) == ("KIND_GPU", [0])
