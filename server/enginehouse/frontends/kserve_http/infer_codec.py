"""The body of an inference over HTTP: JSON with optional binary tensors behind it → InferRequest, and back.

Pure but for leases of shared memory. Errors carry Triton's texts; JSON shape errors are Internal (500).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import rapidjson
from numpy.typing import NDArray

from enginehouse.core import ServedVersion
from enginehouse.errors import InvalidArgument
from enginehouse.frontends.http_message import JSON, OCTETS, Buffer, HttpResponse
from enginehouse.frontends.json_values import (
    MAX_INT64,
    JsonTypeError,
    about,
    as_array,
    as_bool,
    as_string,
    as_unsigned,
    member,
    parse_json,
)
from enginehouse.frontends.kserve_http.repeated_heads import MAX_TEXT_BYTES, known_head, remember_head
from enginehouse.frontends.output_options import OutputOption, OutputOptions, classified, write_to_lease
from enginehouse.frontends.raw_request import raw_tensor
from enginehouse.frontends.request_parameters import request_text, set_parameters
from enginehouse.frontends.shared_memory.regions import Lease, Regions
from enginehouse.frontends.tensor_json import bytes_from_json, values_of
from enginehouse.types import DataType, DeviceData, InferRequest, InferResponse, Tensor

HEADER_LENGTH = "Inference-Header-Content-Length"
_SOURCES = "'data', 'binary_data_size' in 'parameters', 'shared_memory_region' in 'parameters'"


@dataclass(slots=True)
class BinaryTail:
    """The bytes behind the JSON, taken from the front by one binary input after the other."""

    data: memoryview
    position: int = 0

    @property
    def num_left(self) -> int:
        return self.data.nbytes - self.position

    def take(self, num_bytes: int) -> memoryview:
        start = self.position
        self.position += num_bytes
        return self.data[start : self.position]


@dataclass(slots=True)
class BodyDecoder:
    """Fills one request and its options. `max_input_bytes` bounds tensors, whatever form they come in.

    `options.leases` may hold leases even when a method raises: release them.
    """

    request: InferRequest
    options: OutputOptions
    regions: Regions
    max_input_bytes: int

    def decode_raw(self, body: Buffer, served: ServedVersion) -> None:
        """From a body that is one tensor; every output comes back as bytes."""
        self._check_size("request body size of", len(body))
        try:
            tensor = raw_tensor(served, memoryview(body))
        except InvalidArgument as error:
            raise InvalidArgument(request_text(self.request.id) + str(error)) from None
        self.request.inputs[tensor.name] = tensor
        self.options.default = OutputOption(binary=True)

    def decode(self, body: Buffer, header_length: int, document: Any = None) -> None:
        """From JSON of that length and the binary tensors behind it. `document`: the JSON, if it is parsed already."""
        view = memoryview(body)
        if document is not None:
            tail = view[header_length:]
            self._check_size("request body size of", len(tail))
            self._read(document, tail)
            return
        if header_length == len(view):
            self._read(parse_json(body), memoryview(b""))
            return
        tail = view[header_length:]
        self._check_size("request body size of", len(tail))
        text = bytes(view[:header_length])
        known = known_head(text, len(tail))
        if known is not None:
            known.fill(self.request, self.options, tail)
            return
        document = parse_json(text)
        self._read(document, tail)
        if header_length <= MAX_TEXT_BYTES:
            remember_head(text, document, self.request, self.options)

    def _read(self, document: Any, data: memoryview) -> None:
        request, tail = self.request, BinaryTail(data)
        for entry in self._read_head(document):
            tensor = self._input(entry, tail)
            request.inputs[tensor.name] = tensor
        if tail.num_left:
            raise InvalidArgument(f"unexpected additional input data for model '{request.model_name}'")
        if "outputs" in document:
            try:
                outputs = as_array(document["outputs"])
            except JsonTypeError as error:
                raise about("Unable to parse 'outputs'", error) from None
            request.requested_outputs = [self._output(entry) for entry in outputs]

    def _check_size(self, what: str, num_bytes: int) -> None:
        if num_bytes > self.max_input_bytes:
            raise InvalidArgument(
                f"{what} {num_bytes} bytes exceeds the maximum allowed value of {self.max_input_bytes} bytes. "
                "Use --http-max-input-size to increase the limit."
            )

    def _read_head(self, document: Any) -> list[Any]:
        """Takes over id and parameters; returns the inputs' entries."""
        if isinstance(document, dict):
            if "id" in document:
                try:
                    self.request.id = as_string(document["id"])
                except JsonTypeError as error:
                    raise about("Unable to parse 'id'", error) from None
            if "parameters" in document:
                parameters = document["parameters"]
                set_parameters(self.request, parameters)
                self.options.default = OutputOption(binary=parameters.get("binary_data_output", False))
        try:
            return as_array(member(document, "inputs"))
        except JsonTypeError as error:
            raise about("Unable to parse 'inputs'", error) from None

    def _input(self, entry: Any, tail: BinaryTail) -> Tensor:
        parameters = _parameters_of(entry)
        _check_one_source(entry, parameters)
        name = _text_field(entry, "name")
        type_name = _text_field(entry, "datatype")
        try:
            shape = tuple(map(as_unsigned, as_array(member(entry, "shape"))))
        except JsonTypeError as error:
            raise about("Unable to parse 'shape'", error) from None
        if name in self.request.inputs:
            raise InvalidArgument(f"{request_text(self.request.id)}input '{name}' already exists in request")
        datatype = DataType.from_request(type_name)
        data: memoryview | DeviceData
        if "binary_data_size" in parameters:
            data = self._take_binary(tail, parameters, name)
        elif (found := _range(parameters)) is not None:
            data = self._lease(found).view()
        else:
            data = memoryview(self._json_data(entry, name, datatype, shape))
        return Tensor(name, datatype, shape, data)

    def _take_binary(self, tail: BinaryTail, parameters: dict[str, Any], name: str) -> memoryview:
        num_bytes = _unsigned_parameter(parameters, "binary_data_size")
        if num_bytes > tail.num_left:
            raise InvalidArgument(
                f"unexpected size for input '{name}', expecting {num_bytes - tail.num_left} additional bytes "
                f"for model '{self.request.model_name}'"
            )
        return tail.take(num_bytes)

    def _lease(self, found: tuple[str, int, int]) -> Lease:
        lease = self.regions.lease(*found)
        self.options.leases.append(lease)
        return lease

    def _json_data(self, entry: Any, name: str, datatype: DataType, shape: Sequence[int]) -> bytes:
        num_elements = math.prod(shape)
        if not shape or num_elements == 0:
            return b""
        if datatype is DataType.INVALID:
            raise InvalidArgument(f"invalid datatype for input {name}")
        if num_elements > MAX_INT64:
            raise InvalidArgument(
                f"shape of input '{name}' causes total element count to exceed maximum size of {MAX_INT64}"
            )
        if num_elements * datatype.item_size > MAX_INT64:
            raise InvalidArgument(f"byte size overflow for input {name}")
        if datatype in (DataType.FP16, DataType.BF16):
            raise InvalidArgument(
                f"receiving {datatype.wire_name} data via JSON is not supported. Please use the binary data "
                f"format for input {name}"
            )
        self._check_size(f"JSON data of input '{name}':", num_elements * datatype.item_size)
        try:
            return bytes_from_json(_field(entry, "data"), datatype, shape)
        except JsonTypeError as error:
            raise about("Unable to parse 'data'", error) from None

    def _output(self, entry: Any) -> str:
        parameters = _parameters_of(entry)
        in_shared_memory = "shared_memory_region" in parameters
        if in_shared_memory:
            for other in ("classification", "binary_data"):
                if parameters.get(other):
                    raise InvalidArgument(f"Output can't set both 'shared_memory_region' and '{other}'")
        name = _text_field(entry, "name")
        option = OutputOption()
        if "classification" in parameters:
            try:
                option.num_classes = as_unsigned(parameters["classification"])
            except JsonTypeError as error:
                raise about("Unable to set 'classification'", error) from None
        if (found := _range(parameters)) is not None:
            option.lease = self._lease(found)
        elif "binary_data" in parameters:
            try:
                option.binary = as_bool(parameters["binary_data"])
            except JsonTypeError as error:
                raise about("Unable to parse 'binary_data'", error) from None
        self.options.by_name[name] = option
        return name


def _field(entry: Any, name: str) -> Any:
    try:
        return member(entry, name)
    except JsonTypeError as error:
        raise about(f"Unable to parse '{name}'", error) from None


def _text_field(entry: Any, name: str) -> str:
    try:
        return as_string(member(entry, name))
    except JsonTypeError as error:
        raise about(f"Unable to parse '{name}'", error) from None


def _unsigned_parameter(parameters: dict[str, Any], key: str) -> int:
    try:
        return as_unsigned(parameters[key])
    except JsonTypeError as error:
        raise about(f"Unable to parse '{key}'", error) from None


def _range(parameters: dict[str, Any]) -> tuple[str, int, int] | None:
    """The region, offset and size that the parameters name; read even without a region, as types are checked."""
    region, offset, num_bytes = None, 0, 0
    if "shared_memory_region" in parameters:
        region = _text_field(parameters, "shared_memory_region")
    if "shared_memory_offset" in parameters:
        offset = _unsigned_parameter(parameters, "shared_memory_offset")
    if "shared_memory_byte_size" in parameters:
        num_bytes = _unsigned_parameter(parameters, "shared_memory_byte_size")
    return None if region is None else (region, offset, num_bytes)


def _parameters_of(entry: Any) -> dict[str, Any]:
    parameters = entry.get("parameters") if isinstance(entry, dict) else None
    return parameters if isinstance(parameters, dict) else {}


def _check_one_source(entry: Any, parameters: dict[str, Any]) -> None:
    given = ["data"] if isinstance(entry, dict) and "data" in entry else []
    given += [name for name in ("binary_data_size", "shared_memory_region") if name in parameters]
    if len(given) == 1:
        return
    found = "But set " + " ".join(f"'{name}'" for name in given) if given else "But no field is set"
    raise InvalidArgument(f"Input must set only one of the following fields: {_SOURCES}. {found}")


def encode_response(response: InferResponse, options: OutputOptions, served: ServedVersion) -> HttpResponse:
    """The answer with the outputs as they were asked for. Writes those that go to shared memory.

    Raises InvalidArgument or Internal for an output that can't take the form it was asked for in.
    """
    binary: list[memoryview] = []
    head = _response_head(response)
    head["outputs"] = [_encode_output(tensor, options, served, binary) for tensor in response.outputs]
    text = dump_json(head)
    if not any(chunk.nbytes for chunk in binary):
        return HttpResponse(200, JSON, (text,))
    return HttpResponse(200, OCTETS, (text, *binary), ((HEADER_LENGTH, str(len(text))),))


def _response_head(response: InferResponse) -> dict[str, Any]:
    head: dict[str, Any] = {"id": response.id} if response.id else {}
    head["model_name"] = response.model_name
    head["model_version"] = response.model_version
    if response.parameters:
        head["parameters"] = dict(response.parameters)
    return head


def _encode_output(
    tensor: Tensor, options: OutputOptions, served: ServedVersion, binary: list[memoryview]
) -> dict[str, Any]:
    option = options.of(tensor.name)
    tensor = classified(tensor, option, served)
    entry: dict[str, Any] = {
        "name": tensor.name,
        "datatype": tensor.datatype.wire_name,
        "shape": tensor.shape,
    }
    if option.lease is not None:
        write_to_lease(tensor, option.lease)
    elif option.binary:
        entry["parameters"] = {"binary_data_size": tensor.nbytes}
        binary.append(tensor.host_data())
    else:
        entry["data"] = values_of(tensor)
    return entry


def dump_json(document: Any) -> bytes:
    """As JSON text with NaN and Infinity where they occur, which strict JSON doesn't have."""
    text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    # orjson writes them as null; nothing else in an answer is null.
    if b"null" in text:
        written: str = rapidjson.dumps(document, ensure_ascii=False, default=_as_list)
        return written.encode()
    return text


def _as_list(values: NDArray[Any]) -> list[Any]:
    listed: list[Any] = values.tolist()
    return listed
