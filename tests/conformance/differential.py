"""Generated inference requests, right and wrong, sent to two servers: where do the answers differ?

`run` is the corpus's run.py: it sends a step and compares answers. The same seed gives the same requests.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Step = dict[str, Any]

_MODELS: tuple[tuple[str, tuple[tuple[str, str, list[int]], ...], str], ...] = (
    ("add_sub", (("INPUT0", "INT32", [1, 4]), ("INPUT1", "INT32", [1, 4])), "OUTPUT0"),
    ("id_bool", (("IN", "BOOL", [1, 3]),), "OUT"),
    ("id_bytes", (("IN", "BYTES", [1, 3]),), "OUT"),
    ("var_dims", (("X", "INT64", [1, 2, 2]),), "Y"),
    ("optional_in", (("IN_A", "FP32", [1, 2]), ("IN_B", "INT32", [1, 3])), "OUT_A"),
    ("classify", (("SCORES", "FP32", [2, 5]),), "PROB"),
    ("ens_chain", (("E_IN", "INT32", [1, 4]),), "E_OUT"),
    ("inspect", (("X", "FP32", [2]),), "REPORT"),
)
_VALUES: dict[str, tuple[Any, ...]] = {
    "INT32": (0, -1, 2**31 - 1), "INT64": (0, -(2**63)), "FP32": (0.5, -2, 1e38), "BOOL": (True, False),
    "BYTES": ("a", "", "\u00e9"),
}  # fmt: skip
_FIELDS = {
    "INT32": "int_contents", "INT64": "int64_contents", "FP32": "fp32_contents", "BOOL": "bool_contents",
    "BYTES": "bytes_contents",
}  # fmt: skip
_ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 2**63 - 1, -(2**63) - 1, "", "1", [], [1], ["a"], [[]], {}, {"a": 1}, [None], float("nan"),
)  # fmt: skip
_REQUEST_KEYS = ("sequence_id", "sequence_start", "priority", "timeout", "binary_data_output", "color", "triton_x")
_TENSOR_KEYS = ("shared_memory_offset", "shared_memory_byte_size", "shared_memory_region", "binary_data_size", "color")
_TYPES = ("FP32", "INT32", "BYTES", "FP16", "nope", "")


@dataclass(slots=True)
class Generator:
    chance: random.Random

    def steps(self, count: int) -> Iterator[Step]:
        for number in range(count):
            yield self._grpc() if number % 3 == 0 else self._http()

    def _entries(self) -> tuple[str, list[dict[str, Any]], str]:
        model, inputs, output = self.chance.choice(_MODELS)
        return model, [{"name": n, "datatype": t, "shape": list(s)} for n, t, s in inputs], output

    def _values(self, entry: dict[str, Any]) -> list[Any]:
        count = 1
        for size in entry["shape"]:
            count *= size
        return [self.chance.choice(_VALUES[entry["datatype"]]) for _ in range(count)]

    def _http(self) -> Step:
        model, inputs, output = self._entries()
        for entry in inputs:
            entry["data"] = self._values(entry)
        document: dict[str, Any] = {"inputs": inputs}
        for _ in range(self.chance.choice((0, 1, 1, 2))):
            self._spoil(document, output)
        text = json.dumps(document)
        if self.chance.random() < 0.05:
            text = text[: self.chance.randrange(len(text))]
        headers = {"Content-Type": "application/json"}
        return {"do": "http", "method": "POST", "path": f"/v2/models/{model}/infer", "text": text, "headers": headers}

    def _spoil(self, document: dict[str, Any], output: str) -> None:
        choice, odd = self.chance.choice, self.chance.choice(_ODD)
        inputs = document["inputs"]
        entry = choice(inputs) if isinstance(inputs, list) and inputs else {}
        entry = entry if isinstance(entry, dict) else {}
        match self.chance.randrange(8):
            case 0:
                document[choice(("inputs", "outputs", "id", "parameters", "xyz"))] = odd
            case 1:
                entry[choice(("name", "datatype", "shape", "data", "parameters"))] = odd
            case 2:
                entry.pop(choice(("name", "datatype", "shape", "data")), None)
            case 3:
                entry["datatype"] = choice(_TYPES)
            case 4:
                entry["parameters"] = {choice(_TENSOR_KEYS): odd}
            case 5:
                document["parameters"] = {choice(_REQUEST_KEYS): odd}
            case 6:
                keys = ("binary_data", *_output_keys(output))
                document["outputs"] = [{"name": choice((output, "nope")), "parameters": {choice(keys): odd}}]
            case _ if isinstance(inputs, list):
                inputs.append(dict(entry))

    def _grpc(self) -> Step:
        model, inputs, output = self._entries()
        for entry in inputs:
            values = self._values(entry)
            if entry["datatype"] == "BYTES":
                values = ["YQ=="] * len(values)
            entry["contents"] = {_FIELDS[entry["datatype"]]: values}
        request: dict[str, Any] = {"model_name": model, "inputs": inputs, "outputs": [{"name": output}]}
        entry, choice = self.chance.choice(inputs), self.chance.choice
        value = choice(({"bool_param": True}, {"int64_param": "-1"}, {"string_param": "x"}, {"int64_param": "16"}, {}))
        match self.chance.randrange(7):
            case 0:
                entry["datatype"] = choice(_TYPES)
            case 1:
                entry["shape"] = choice(([], [0], [4], [-1], [1, 1, 1]))
            case 2:
                entry["contents"] = {choice(tuple(_FIELDS.values())): []}
            case 3:
                entry["parameters"] = {choice(_TENSOR_KEYS): value}
            case 4:
                request["parameters"] = {choice(_REQUEST_KEYS): value}
            case 5:
                request["outputs"][0]["parameters"] = {choice(_output_keys(output)): value}
            case _:
                inputs.append(dict(entry))
        return {"do": "grpc", "method": "ModelInfer", "request": request}


def _output_keys(output: str) -> tuple[str, ...]:
    """Classes of text outputs end Triton's process."""
    return (*(("classification",) if output == "PROB" else ()), *_TENSOR_KEYS)


def differences(run: Any, peer: Any, ours: Any, seed: int, count: int) -> list[str]:
    """One text for each request that `ours` answers unlike `peer`."""
    found = []
    for step in Generator(random.Random(seed)).steps(count):
        expected = run.normalize(step, run.execute(peer, step))
        loose, strict = run.compare_step(step | {"expect": expected}, run.execute(ours, step))
        if loose or strict:
            found.append(f"{json.dumps(step)}\n    {(loose or strict)[0]}")
    return found
