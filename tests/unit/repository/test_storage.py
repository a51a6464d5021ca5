"""Addresses, accounts and layouts of repositories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from enginehouse.config.artifacts import version_folders
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument
from enginehouse.repository.credentials import filesystem_options, parse_address
from enginehouse.repository.layout import Entry, models_in, pick_versions
from enginehouse.repository.storage import LocalRoot, cache_directory, open_root


@pytest.mark.parametrize(
    ("url", "path", "endpoint", "account"),
    [
        ("s3://bucket/models/", "bucket/models", "", ""),
        ("s3://bucket", "bucket", "", ""),
        ("s3://localhost:9000/bucket/models", "bucket/models", "http://localhost:9000", ""),
        ("s3://https://host.example:9000/bucket//models", "bucket/models", "https://host.example:9000", ""),
        ("s3://https://host.example/bucket", "bucket", "https://host.example", ""),
        ("gs://bucket/models", "bucket/models", "", ""),
        ("as://account.blob.core.windows.net/container/models", "container/models", "", "account"),
        ("as://account/container", "container", "", "account"),
        ("hf://owner/name@main", "owner/name@main", "", ""),
    ],
)
def test_addresses(url: str, path: str, endpoint: str, account: str) -> None:
    address = parse_address(url)
    assert (address.path, address.endpoint, address.account) == (path, endpoint, account)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("ftp://host/x", "found 'ftp://', allowed: a folder, s3://, gs://, as://, hf://"),
        ("s3://", "names no bucket"),
        ("as://account", "allowed: as://ACCOUNT/CONTAINER[/FOLDER]"),
        ("hf://name", "allowed: hf://OWNER/NAME[@REVISION]"),
    ],
)
def test_what_is_no_address_is_refused(url: str, text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_address(url)
    assert text in str(caught.value)


CREDENTIALS = {
    "s3": {
        "": {"key_id": "any", "secret_key": "s"},
        "s3://team": {"key_id": "team", "secret_key": "s", "region": "eu-west-1"},
        "s3://team/secret": {"profile": "vault", "session_token": "t"},
    },
    "gs": {"": "key.json"},
    "as": {"": {"account_str": "name", "account_key": "key"}},
}


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("s3://other/x", {"key": "any", "secret": "s"}),
        ("s3://team/x", {"key": "team", "secret": "s", "client_kwargs": {"region_name": "eu-west-1"}}),
        ("s3://team/secret/x", {"profile": "vault", "token": "t"}),
        ("gs://bucket", {"token": "key.json"}),
        ("as://account/container", {"account_name": "name", "account_key": "key"}),
    ],
)
def test_the_longest_prefix_of_the_credential_file_wins(url: str, options: dict[str, object]) -> None:
    assert filesystem_options(parse_address(url), CREDENTIALS, {}) == options


@pytest.mark.parametrize(
    ("url", "environment", "options"),
    [
        ("s3://b", {}, {}),
        ("s3://b", {"AWS_DEFAULT_REGION": "r"}, {"client_kwargs": {"region_name": "r"}}),
        ("gs://b", {"GOOGLE_APPLICATION_CREDENTIALS": "f"}, {"token": "f"}),
        ("as://a/c", {"AZURE_STORAGE_KEY": "k"}, {"account_name": "a", "account_key": "k"}),
        ("as://a/c", {"AZURE_STORAGE_CONNECTION_STRING": "x"}, {"connection_string": "x"}),
        ("hf://o/n", {"HF_ENDPOINT": "e", "HF_TOKEN": "t"}, {"endpoint": "e", "token": "t"}),
    ],
)
def test_without_a_credential_file_the_environment_decides(
    url: str, environment: dict[str, str], options: dict[str, object]
) -> None:
    assert filesystem_options(parse_address(url), {}, environment) == options


def test_a_broken_credential_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    path.write_text("{")
    with pytest.raises(InvalidArgument, match=r"credentials\.json \(TRITON_CLOUD_CREDENTIAL_PATH\) can't be read"):
        open_root("s3://b", environment={"TRITON_CLOUD_CREDENTIAL_PATH": str(path)})
    path.write_text(json.dumps([]))
    with pytest.raises(InvalidArgument, match="holds no JSON object"):
        open_root("s3://b", environment={"TRITON_CLOUD_CREDENTIAL_PATH": str(path)})


def test_where_downloads_are_kept() -> None:
    address = parse_address("s3://b")
    assert cache_directory(address, "/d", {"TRITON_AWS_MOUNT_DIRECTORY": "/t"}) == Path("/d")
    assert cache_directory(address, "", {"TRITON_AWS_MOUNT_DIRECTORY": "/t"}) == Path("/t")
    assert cache_directory(address, "", {"HOME": "/h"}) == Path("/h/.cache/enginehouse/repositories")


def test_a_folder_is_a_root_that_can_be_watched(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}"):
        assert open_root(url).watched_folder == tmp_path


def test_folders_and_bare_files_are_models() -> None:
    entries = [Entry(name, is_folder=True) for name in ("net", ".half", "__pycache__")]
    entries += [Entry(name, is_folder=False) for name in ("net.onnx", "tree.onnx", "tree.onnx.data", "README.md")]
    assert {name: entry.name for name, entry in models_in(entries).items()} == {"net": "net", "tree": "tree.onnx"}


@pytest.mark.parametrize("name", ["..", "", "a/b", "../m", ".git", "missing"])
def test_a_name_finds_nothing_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "root" / ".git").mkdir(parents=True)
    (tmp_path / "m").mkdir()
    assert LocalRoot(tmp_path / "root").find(name) is None


def test_a_folder_without_versions_is_its_own(tmp_path: Path) -> None:
    config = ModelConfig(default_model_filename="model.onnx", backend="onnxruntime")
    assert version_folders(tmp_path, config) == {}
    (tmp_path / "model.onnx").touch()
    assert version_folders(tmp_path, config) == {1: tmp_path}
    (tmp_path / "3").mkdir()
    assert version_folders(tmp_path, config) == {3: tmp_path / "3"}


def test_a_model_that_is_fetched_by_its_id_needs_no_file(tmp_path: Path) -> None:
    config = ModelConfig(backend="llm")
    config.serving.llm.model = "owner/name"
    assert version_folders(tmp_path, config) == {1: tmp_path}


@pytest.mark.parametrize(
    ("policy", "picked"),
    [
        ({}, [10]),
        ({"latest": {"num_versions": 2}}, [2, 10]),
        ({"latest": {"num_versions": 0}}, []),
        ({"all": {}}, [1, 2, 10]),
        ({"specific": {"versions": [1, 7]}}, [1]),
    ],
)
def test_the_version_policy_picks(policy: dict[str, object], picked: list[int]) -> None:
    from google.protobuf import json_format

    config = json_format.ParseDict({"version_policy": policy} if policy else {}, ModelConfig())
    folders = {version: Path(str(version)) for version in (2, 10, 1)}
    assert sorted(pick_versions(config, folders)) == picked
