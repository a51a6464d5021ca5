"""The setting `quantization` of a model's config reaches its weights, and a wrong one is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from enginehouse.errors import EnginehouseError
from tests.acceptance.llm.serving import Serving
from tests.acceptance.llm.small_models import save_reference


def test_an_asked_rounding_is_done_and_an_unknown_one_refused(tmp_path: Path) -> None:
    save_reference("quantizable", tmp_path)
    prompt = list(range(3, 20))
    serving = Serving(tmp_path, quantization="int8")
    try:
        assert len(serving.generate(prompt).token_ids) == 24
        kernels = {type(part).__name__ for part in serving.instance._runner._executor._program._parts}  # type: ignore[attr-defined]
        assert "NativeCodedLinear" in kernels
    finally:
        serving.close()
    with pytest.raises(EnginehouseError, match="'quantization: int3' is not possible"):
        Serving(tmp_path, quantization="int3")
