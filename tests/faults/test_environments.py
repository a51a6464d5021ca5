"""A model's process runs on the environment that the model brings; the server's packages only fill in."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from enginehouse.errors import EnginehouseError
from enginehouse.execution.environments import is_satisfied
from enginehouse.execution.hosts import HostOptions
from tests.faults.hosting import hosted, request_of

MODEL = """
import sys
import numpy as np
import triton_python_backend_utils as pb_utils
{imports}

class TritonPythonModel:
    def execute(self, requests):
        said = np.array([sys.prefix, {value}], dtype=np.object_)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", said)]) for _ in requests]
"""


def write_model(folder: Path, value: str, imports: str = "") -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(textwrap.dedent(MODEL).format(imports=imports, value=value))


async def say(folder: Path, cache: Path, changes: str = "") -> list[str]:
    """What the model says of itself: the prefix of its interpreter, and the value."""
    options = HostOptions(environment_cache=cache)
    async with hosted(f'backend: "python" {changes}', options, folder) as host:
        answered = await host.run_requests([request_of(1)])
        [[response]] = answered.responses.values()
        assert response.error is None, str(response.error)
        return [item.decode() for item in response.outputs[0].numpy().tolist()]


def make_venv(folder: Path, greeting: str) -> None:
    """With a package `greeting` of its own."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "greeting.py").write_text(f"TEXT = {greeting!r}\n")


def make_wheel(folder: Path) -> None:
    """`greeting` 1.0, the least that pip installs."""
    with zipfile.ZipFile(folder / "greeting-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("greeting.py", "TEXT = 'from a wheel'\n")
        wheel.writestr("greeting-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")
        wheel.writestr("greeting-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("greeting-1.0.dist-info/RECORD", "")


@pytest.mark.asyncio
async def test_without_an_environment_it_is_the_servers(tmp_path: Path) -> None:
    write_model(tmp_path / "m", "'x'")
    assert await say(tmp_path / "m", tmp_path / "cache") == [sys.prefix, "x"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.asyncio
async def test_a_venv_by_its_interpreter(tmp_path: Path) -> None:
    write_model(tmp_path / "m", "greeting.TEXT", "import greeting")
    make_venv(tmp_path / "m" / "env", "hello")
    said = await say(tmp_path / "m", tmp_path, 'serving { python { interpreter: "env/bin/python" } }')
    assert said == [str(tmp_path / "m" / "env"), "hello"]


@pytest.mark.asyncio
@pytest.mark.parametrize("as_folder", [False, True])
async def test_tritons_execution_environment(tmp_path: Path, as_folder: bool) -> None:
    write_model(tmp_path / "m", "greeting.TEXT", "import greeting")
    make_venv(tmp_path / "env", "from the archive")
    if as_folder:
        value = str(tmp_path / "env")
    else:
        with tarfile.open(tmp_path / "m" / "env.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / "env", arcname=".")
        value = "$$TRITON_MODEL_DIRECTORY/env.tar.gz"
    changes = f'parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{value}" }} }}'
    prefix, text = await say(tmp_path / "m", tmp_path / "cache", changes)
    assert text == "from the archive"
    assert prefix.startswith(str(tmp_path / ("env" if as_folder else "cache")))


@pytest.mark.asyncio
async def test_requirements_are_installed_once(tmp_path: Path) -> None:
    write_model(tmp_path / "m", "greeting.TEXT", "import greeting")
    make_wheel(tmp_path / "m")
    (tmp_path / "m" / "requirements.txt").write_text("--no-index\n--find-links .\ngreeting==1.0\n")
    first = await say(tmp_path / "m", tmp_path / "cache")
    assert first[1] == "from a wheel"
    assert first[0].startswith(str(tmp_path / "cache"))
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    assert await say(tmp_path / "m", tmp_path / "cache") == first
    assert {path: path.stat().st_mtime_ns for path in made} == made


@pytest.mark.asyncio
async def test_requirements_that_the_server_meets_need_no_environment(tmp_path: Path) -> None:
    write_model(tmp_path / "m", "'x'")
    (tmp_path / "m" / "requirements.txt").write_text("numpy>=1  # any\n\nmsgspec\nnothing ; sys_platform == 'win32'\n")
    assert (await say(tmp_path / "m", tmp_path / "cache"))[0] == sys.prefix


@pytest.mark.asyncio
async def test_variables_reach_the_model(tmp_path: Path) -> None:
    write_model(tmp_path / "m", "os.environ['COLOUR']", "import os")
    changes = 'serving { python { variables { key: "COLOUR" value: "blue" } } }'
    assert (await say(tmp_path / "m", tmp_path, changes))[1] == "blue"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ('serving { python { interpreter: "nowhere/python" } }', "python interpreter not found: "),
        ('serving { python { archive: "nowhere.tar.gz" } }', "python environment not found: "),
        ('serving { python { archive: "broken.tar.gz" } }', "can't be unpacked"),
        ('serving { python { requirements: "nothing.txt" } }', "requirements file of model 'm' not found"),
        ('serving { python { requirements: "impossible.txt" } }', "No matching distribution found for"),
    ],
)
async def test_what_is_wrong_with_it_is_the_loads_error(tmp_path: Path, changes: str, said: str) -> None:
    write_model(tmp_path, "'x'")
    (tmp_path / "broken.tar.gz").write_bytes(b"no archive")
    (tmp_path / "impossible.txt").write_text("--no-index\nno-such-package-anywhere\n")
    with pytest.raises(EnginehouseError) as error:
        await say(tmp_path, tmp_path / "cache", changes)
    assert said in str(error.value)
    assert not list((tmp_path / "cache").glob("requirements-*/")) if "impossible" in changes else True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("numpy", True),
        ("numpy>=1.0,<99", True),
        ("numpy<1.0", False),
        ("no-such-package", False),
        ("-r other.txt", False),
        ("./folder", False),
        ("# nothing\n\n", True),
    ],
)
def test_what_counts_as_met(text: str, expected: bool) -> None:
    assert is_satisfied(text) is expected
