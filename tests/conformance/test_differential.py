"""Generated requests to a real Triton and to us. Addresses come from the environment, as `http,grpc,metrics` each."""

from __future__ import annotations

import importlib.util
import os
import random
from typing import Any

import pytest

from .differential import Generator, differences
from .test_triton_corpus import CORPUS

PEER, OURS = os.environ.get("ENGINEHOUSE_PEER"), os.environ.get("ENGINEHOUSE_SERVER")


def test_the_same_seed_gives_the_same_requests() -> None:
    first, again, other = (repr(list(Generator(random.Random(seed)).steps(50))) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.skipif(not (PEER and OURS and CORPUS.is_dir()), reason="needs two servers on the corpus's models")
@pytest.mark.parametrize("seed", [1, 2])
def test_generated_requests_are_answered_as_triton_answers(seed: int) -> None:
    run = _corpus_runner()
    assert differences(run, _context(run, PEER or ""), _context(run, OURS or ""), seed, 300) == []


def _context(run: Any, addresses: str) -> Any:
    http, grpc, metrics = addresses.split(",")
    return run.Context(http, grpc, metrics)


def _corpus_runner() -> Any:
    spec = importlib.util.spec_from_file_location("corpus_run", CORPUS / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
