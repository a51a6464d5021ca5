"""Raw requests: a body that is nothing but the bytes of a model's only input. Pure.

What a client leaves out (name, type, shape) is deduced from the model's config.
"""

from __future__ import annotations

import math
import struct

from enginehouse.core import ServedVersion
from enginehouse.errors import InvalidArgument
from enginehouse.types import DataType, Tensor

INPUT_NAME = "raw_input"


def raw_tensor(served: ServedVersion, data: memoryview) -> Tensor:
    """The tensor. Raises InvalidArgument where the config leaves more than one reading."""
    config = served.config
    if len(config.input) != 1:
        raise InvalidArgument(
            f"Raw request must only have 1 input (found 1) to be deduced but got {len(config.input)} inputs "
            f"in '{served.name}' model configuration"
        )
    spec = config.input[0]
    datatype = DataType.from_proto(spec.data_type)
    dims = tuple(spec.dims)
    batch = (1,) if config.max_batch_size > 0 else ()
    num_open = sum(dim < 0 for dim in dims)
    if num_open > 1:
        raise InvalidArgument(
            f"The shape of the raw input '{spec.name}' can not be deduced because there are more than one "
            "variable-sized dimension"
        )
    num_fixed = math.prod(dim for dim in dims if dim >= 0)
    if datatype is DataType.BYTES:
        if num_open or num_fixed != 1:
            raise InvalidArgument(f"For BYTE datatype raw input '{spec.name}', the model must have input shape [1]")
        text = memoryview(struct.pack("<I", data.nbytes) + data)
        return Tensor(spec.name, datatype, batch + dims, text)
    if num_open:
        open_size = data.nbytes // (datatype.item_size * num_fixed) if num_fixed else 0
        dims = tuple(open_size if dim < 0 else dim for dim in dims)
    num_expected = math.prod(dims) * datatype.item_size
    if data.nbytes != num_expected:
        raise InvalidArgument(
            f"input byte size mismatch for input '{INPUT_NAME}' for model '{served.name}'. Expected "
            f"{num_expected}, got {data.nbytes}"
        )
    return Tensor(spec.name, datatype, batch + dims, data)
