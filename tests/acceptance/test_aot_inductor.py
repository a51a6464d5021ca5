"""A package compiled ahead of time by AOTInductor, through the PyTorch backend. Needs a C++ compiler."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from enginehouse.errors import InvalidArgument
from tests.unit.backends import torch_models
from tests.unit.backends.test_pytorch import SUM_OUTPUTS, entry, floats, instance_of, tensors

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")]


def test_aot_inductor_package_runs(tmp_path: Path) -> None:
    program = torch_models.exported(torch_models.SumAndDifference(), torch.ones(2, 4), torch.ones(2, 4))
    (tmp_path / "1").mkdir()
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "1" / "model.pt2"))
    text = "max_batch_size: 4 " + entry("input", "INPUT__0") + entry("input", "INPUT__1") + SUM_OUTPUTS
    results = instance_of(tmp_path, text).run(tensors(INPUT__0=floats(5, 5, 5, 5), INPUT__1=floats(1, 2, 3, 4)), [])
    assert results["OUTPUT__1"].numpy().tolist() == [[4, 3, 2, 1]]
    with pytest.raises(InvalidArgument, match="must specify 'input' in the config"):
        instance_of(tmp_path)
