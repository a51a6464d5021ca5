"""What gRPC's own tools expect: reflection, health, cancellation and deadlines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.utils import InferenceServerException

from enginehouse.testing.server import ServerProcess


def test_reflection_describes_the_service(wire: ServerProcess) -> None:
    with grpc.insecure_channel(wire.grpc) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "inference.GRPCInferenceService" in database.get_services()
        file = database.FindFileContainingSymbol("inference.ModelInferRequest")
        assert "ModelStreamInfer" in {method.name for service in file.service for method in service.method}


def test_the_health_service_tells_and_shows_changes(wire: ServerProcess) -> None:
    serving = health_pb2.HealthCheckResponse.SERVING
    with grpc.insecure_channel(wire.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest()).status == serving
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService"))
        assert next(iter(watch)).status == serving
        watch.cancel()


@pytest.fixture
def patient(wire: ServerProcess) -> Iterator[Callable[..., Any]]:
    with grpc_client.InferenceServerClient(wire.grpc) as client:

        def ask(milliseconds: int, **options: Any) -> int:
            tensor = grpc_client.InferInput("IN", [1], "INT32")
            tensor.set_data_from_numpy(np.array([milliseconds], np.int32))
            return int(client.infer("patient", [tensor], **options).as_numpy("OUT")[0])

        yield ask


def test_a_deadline_reaches_the_model(patient: Callable[..., Any]) -> None:
    before = patient(0)
    started = time.monotonic()
    with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
        patient(20_000, client_timeout=0.3)
    assert patient(0) == before + 1
    assert time.monotonic() - started < 10


def test_a_cancelled_stream_reaches_the_model(wire: ServerProcess, patient: Callable[..., Any]) -> None:
    before = patient(0)
    with grpc_client.InferenceServerClient(wire.grpc) as client:
        client.start_stream(lambda result, error: None)
        tensor = grpc_client.InferInput("IN", [1], "INT32")
        tensor.set_data_from_numpy(np.array([20_000], np.int32))
        client.async_stream_infer("patient", [tensor])
        time.sleep(0.3)
        client.stop_stream(cancel_requests=True)
    assert patient(0) == before + 1
