"""What the repositories hold, in every layout."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from enginehouse.repository.agents import AgentModel, Agents, Event, RepositoryAgent
from enginehouse.repository.definition import NotUnique, Override, PollError
from enginehouse.repository.source import Repositories


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "models", {"m/1/model.py": "", "m/2/model.py": "", "m/config.yaml": "max_batch_size: 4"})


def test_layouts(root: Path) -> None:
    write(
        root,
        {
            "bare.onnx": "",
            "bare.onnx.data": "",
            "flat/model.onnx": "",
            "chat/config.json": json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}),
            "chat/model.safetensors": "",
            ".half/1/model.onnx": "",
            "notes.txt": "",
        },
    )
    source = Repositories([root])
    found = {name: source.poll(name, None) for name in source.names()}
    summary = {
        name: (one.config.backend, one.config.default_model_filename, list(one.versions), one.directory.name)
        for name, one in found.items()
    }
    assert summary == {
        "m": ("python", "model.py", [2], "m"),
        "bare": ("onnxruntime", "bare.onnx", [1], "models"),
        "flat": ("onnxruntime", "model.onnx", [1], "flat"),
        "chat": ("llm", "", [1], "chat"),
    }


def test_a_bare_file_is_fingerprinted_with_its_data(root: Path) -> None:
    write(root, {"bare.onnx": "", "bare.onnx.data": "", "other.onnx": ""})
    source = Repositories([root])
    before = source.poll("bare", None)
    write(root, {"other.onnx": "changed"})
    assert source.poll("bare", None).same_as(before)
    write(root, {"bare.onnx.data": "changed"})
    assert not source.poll("bare", None).same_as(before)


def test_a_bare_file_beside_a_folder_named_1_is_refused(root: Path) -> None:
    write(root, {"bare.onnx": "", "1/model.onnx": ""})
    with pytest.raises(PollError, match=r"'bare\.onnx' can't be a model beside a folder named '1'"):
        Repositories([root]).poll("bare", None)


def test_a_version_changes_with_its_own_files_alone(root: Path) -> None:
    write(root, {"m/config.yaml": "version_policy: {all: {}}"})
    source = Repositories([root])
    before = source.poll("m", None).fingerprints
    os.utime(root / "m" / "2" / "model.py", ns=(1, 1))
    after = source.poll("m", None).fingerprints
    assert before[1] == after[1]
    assert before[2] != after[2]


def test_a_model_in_two_repositories_is_refused(root: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", {"m/1/model.py": "", "n/1/model.py": ""})
    source = Repositories([root, other])
    assert source.names() == ["m", "n"]
    assert source.known_duplicates() == {"m"}
    with pytest.raises(NotUnique, match="failed to poll model 'm': not unique across all model repositories"):
        source.poll("m", None)
    assert source.poll("n", None).directory == other / "n"


def test_configs_must_be_whole_where_they_are_not_completed(root: Path) -> None:
    write(root, {"none/1/model.py": "", "part/1/model.py": "", "part/config.yaml": "input: {name: X}"})
    completing, strict = Repositories([root]), Repositories([root], complete_configs=False)
    for name in ("none", "part"):
        assert completing.poll(name, None).name == name
        with pytest.raises(PollError):
            strict.poll(name, None)
    assert strict.poll("m", None).name == "m"


def test_models_may_wait_for_their_first_request(root: Path) -> None:
    write(root, {"lazy/1/model.py": "", "lazy/config.yaml": "serving: {load: on_demand}", "bad/config.yaml": "x"})
    source = Repositories([root])
    assert [name for name in ("m", "lazy", "bad", "nobody") if source.is_on_demand(name)] == ["lazy"]


def test_folders_that_look_like_versions_and_are_none_are_told_of_once(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(root, {"m/003/model.py": "", "m/abc/model.py": "", "m/warmup/data": "", "m/.git/x": ""})
    source = Repositories([root])
    for _ in range(2):
        assert list(source.poll("m", None).versions) == [2]
    assert [record.getMessage().partition(" (in")[0] for record in caplog.records] == [
        "ignore version directory '003' which contains leading zeros in its directory name",
        "ignore version directory 'abc' which fails to convert to integral number",
    ]


def test_an_override_that_loaded_stays_until_the_files_change(root: Path) -> None:
    source = Repositories([root])
    source.loaded(source.poll("m", Override(config='{"max_batch_size": 9}')))
    again = source.poll("m", None)
    assert again.config.max_batch_size == 9
    source.loaded(again)
    assert source.poll("m", None).config.max_batch_size == 9
    write(root, {"m/2/model.py": "changed"})
    assert source.poll("m", None).config.max_batch_size == 4


def test_an_override_that_failed_to_load_is_forgotten_and_the_one_before_stays(root: Path) -> None:
    source = Repositories([root])
    source.poll("m", Override(config='{"max_batch_size": 7}'))  # and no word that it loaded
    assert source.poll("m", None).config.max_batch_size == 4
    source.loaded(source.poll("m", Override(config='{"max_batch_size": 9}')))
    source.poll("m", Override(config='{"max_batch_size": 7}'))
    assert source.poll("m", None).config.max_batch_size == 9


def test_files_of_a_load_request_are_a_place_of_their_own(root: Path) -> None:
    source = Repositories([root])
    given = source.poll("m", Override('{"max_batch_size": 1}', {"5/model.py": b""}))
    assert list(given.versions) == [5]
    assert given.directory.is_dir()
    assert not given.same_as(source.poll("m", None))
    with pytest.raises(PollError, match="is not a path inside"):
        source.poll("m", Override("{}", {"../model.py": b""}))


# --- repository agents


class Decrypting(RepositoryAgent):
    """Leaves a copy whose model.py is reversed, and remembers what it is told."""

    told: list[str]

    def prepare(self, model: AgentModel) -> Path | None:
        folder = model.new_folder()
        write(folder, {"1/model.py": (model.folder / "2" / "model.py").read_text()[::-1]})
        type(self).told.append(f"prepare {model.parameters['key']}")
        return folder

    def notice(self, model: AgentModel, event: Event) -> None:
        type(self).told.append(event)
        raise RuntimeError("an agent's own trouble")


def with_agents(root: Path, agents: str) -> None:
    write(root, {"m/config.yaml": f"model_repository_agents: {{agents: [{agents}]}}", "m/2/model.py": "abc"})


def hash_of(root: Path, algorithm: str) -> str:
    return hashlib.new(algorithm, (root / "m" / "2" / "model.py").read_bytes()).hexdigest()


@pytest.mark.parametrize("algorithm", ["MD5", "sha256"])
def test_a_right_checksum_lets_the_model_pass(root: Path, algorithm: str) -> None:
    with_agents(root, "")
    found = hash_of(root, algorithm.lower())
    with_agents(root, f'{{name: checksum, parameters: {{"{algorithm}:2/model.py": "{found}"}}}}')
    assert Repositories([root]).poll("m", None).directory == root / "m"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("MD5:2/model.py", "Mismatched MD5 hash for file 2/model.py, expect: 0, got: 900150983cd24fb0d6963f7d28e17f72"),
        ("2/model.py", "failed to parse key: 2/model.py"),
        ("CRC:2/model.py", "Unsupported checksum algorithm: CRC"),
        ("MD5:9/model.py", "failed to open text file for read 9/model.py: No such file or directory"),
        ("MD5:../../x", "checksum of a file outside of the model's folder"),
    ],
)
def test_a_wrong_checksum_refuses_the_model(root: Path, key: str, text: str) -> None:
    with_agents(root, f'{{name: checksum, parameters: {{"{key}": "0"}}}}')
    with pytest.raises(PollError) as caught:
        Repositories([root]).poll("m", None)
    assert text in str(caught.value)


def test_an_agent_may_give_another_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decrypting, "told", [], raising=False)
    monkeypatch.setattr(Agents, "_class", lambda self, name: Decrypting)
    with_agents(root, "{name: decrypt, parameters: {key: k}}")
    source = Repositories([root])
    first = source.poll("m", None)
    assert list(first.versions) == [1]
    assert (first.directory / "1" / "model.py").read_text() == "cba"
    assert source.poll("m", None).same_as(first)
    assert first.agents is not None
    first.agents.notice(Event.LOADED)
    assert Decrypting.told == ["prepare k", "loaded"]
    write(root, {"m/2/model.py": "xyz"})
    second = source.poll("m", None)
    assert not second.same_as(first)
    assert first.directory.is_dir()


AGENT = """
from enginehouse.repository.agents import RepositoryAgent

class Agent(RepositoryAgent):
    def prepare(self, model):
        return model.folder.parent / model.parameters["to"]
"""


def test_the_agent_of_the_docs_works(root: Path, tmp_path: Path) -> None:
    docs = Path(__file__).resolve().parents[3] / "docs" / "repositories.md"
    code = docs.read_text().split("```python\n")[1].split("```")[0]
    write(tmp_path / "agents", {"xor/agent.py": code})
    with_agents(root, "{name: xor}")
    found = Repositories([root], agents=Agents(tmp_path / "agents")).poll("m", None)
    assert (found.directory / "2" / "model.py").read_bytes() == bytes(byte ^ 0x5A for byte in b"abc")


def test_agents_are_found_in_the_agent_directory(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "agents", {"elsewhere/agent.py": AGENT, "empty/agent.py": ""})
    write(root, {"target/1/model.py": ""})
    agents = Agents(tmp_path / "agents")
    with_agents(root, "{name: elsewhere, parameters: {to: target}}")
    assert Repositories([root], agents=agents).poll("m", None).directory == root / "target"
    with_agents(root, "{name: elsewere}")
    with pytest.raises(PollError, match="there is no repository agent 'elsewere'; did you mean 'elsewhere'"):
        Repositories([root], agents=agents).poll("m", None)
    with_agents(root, "{name: empty}")
    with pytest.raises(PollError, match=r"has no class Agent\(RepositoryAgent\)"):
        Repositories([root], agents=agents).poll("m", None)
