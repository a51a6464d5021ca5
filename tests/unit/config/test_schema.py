"""The schema is current, and it is the one that existing clients speak."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from enginehouse.config import schema

REPOSITORY = Path(__file__).resolve().parents[3]
CONFIG = REPOSITORY / "server" / "enginehouse" / "config"


def test_generated_files_are_current(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is a development tool")
    script = REPOSITORY / "protos" / "generate.py"
    subprocess.run([sys.executable, script, "--target", tmp_path], check=True)
    assert (tmp_path / "schema.pyi").read_text() == (CONFIG / "schema.pyi").read_text()
    fresh = FileDescriptorSet.FromString((tmp_path / "schema.binpb").read_bytes())
    committed = FileDescriptorSet.FromString((CONFIG / "schema.binpb").read_bytes())
    assert fresh == committed


def _client_messages() -> list[Descriptor]:
    from tritonclient.grpc import model_config_pb2, service_pb2

    files = (model_config_pb2.DESCRIPTOR, service_pb2.DESCRIPTOR)
    return [message for file in files for message in file.message_types_by_name.values()]


@pytest.mark.parametrize("theirs", _client_messages(), ids=lambda message: str(message.name))
def test_every_field_of_the_client_has_its_number_and_type(theirs: Descriptor) -> None:
    ours = schema.POOL.FindMessageTypeByName(theirs.full_name)
    found = [(field.name, field.number, field.type, field.is_repeated) for field in ours.fields]
    expected = [(field.name, field.number, field.type, field.is_repeated) for field in theirs.fields]
    assert [entry for entry in found if entry in expected] == expected


def test_bytes_of_the_client_mean_the_same() -> None:
    from tritonclient.grpc import model_config_pb2

    theirs = model_config_pb2.ModelConfig(name="m", max_batch_size=8)
    theirs.input.add(name="X", data_type="TYPE_FP32", dims=[-1, 3])
    theirs.sequence_batching.oldest.max_candidate_sequences = 4
    ours = schema.ModelConfig.FromString(theirs.SerializeToString())
    assert str(ours) == str(theirs)


def test_stub_names_what_the_module_has() -> None:
    assert schema.DataType.Name(schema.TYPE_BF16) == "TYPE_BF16"
    assert schema.ModelInstanceGroup.Kind.Name(schema.ModelInstanceGroup.KIND_CPU) == "KIND_CPU"
    assert schema.GRPC_INFERENCE_SERVICE.full_name == schema.SERVICE_NAME
    assert schema.ModelServing.HOST_PROCESS == 2
