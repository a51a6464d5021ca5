"""The C interface of program.cpp for Python: its structures, and one loaded library for each process."""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from enum import IntEnum

from enginehouse_backends.llm.kernels.build import kernel_library

logger = logging.getLogger(__name__)

_VERSION = 5


class Kind(IntEnum):
    EMBED = 0
    NORM = 1
    ADD_NORM = 2
    LINEAR = 3
    TURN = 4
    ATTEND = 5
    GATED = 6
    ADD = 7
    SELECT = 8
    SCALE = 9
    SOFTCAP = 10
    CAST = 11
    ARGMAX = 12
    ROUND = 13
    CODED = 14


class NativeType(IntEnum):
    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2


class NativeOperation(Structure):
    """See Operation in program.cpp."""

    _fields_ = (
        ("kind", c_int32), ("wanted_rows", c_int32), ("n", c_int64), ("k", c_int64),
        ("input", c_void_p), ("input_stride", c_int64), ("second", c_void_p), ("second_stride", c_int64),
        ("output", c_void_p), ("output_stride", c_int64), ("sum", c_void_p), ("sum_stride", c_int64),
        ("weight", c_void_p), ("bias", c_void_p), ("rope", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p),
        ("number", c_float), ("epsilon", c_float), ("softcap", c_float),
        ("layer", c_int32), ("heads", c_int32), ("kv_heads", c_int32), ("dim", c_int32), ("rotary_dim", c_int32),
        ("window", c_int32), ("choice", c_int32),
    )  # fmt: skip


UNIT = 32
"""Inputs that share a scale when they are rounded for codes."""
UNIT_BYTES = UNIT + 8
CODED_BLOCK = 64
"""Outputs of a packed block of codes."""


class NativeCodes(Structure):
    """See CodedWeights in coded.hpp."""

    _fields_ = (
        ("codes", c_void_p), ("scales", c_void_p), ("zeros", c_void_p), ("bias", c_void_p), ("order", c_void_p),
        ("outputs", c_int64), ("inputs", c_int64), ("multiplier", c_float),
        ("bits", c_int32), ("units_in_group", c_int32), ("default_zero", c_int32),
    )  # fmt: skip


class NativeStep(Structure):
    """See Step and Sequences in program.cpp and attention.hpp."""

    _fields_ = (
        ("tokens", c_void_p), ("positions", c_void_p), ("token_sequences", c_void_p), ("query_starts", c_void_p),
        ("slots", c_void_p), ("block_table", c_void_p), ("table_stride", c_int64), ("arena", c_void_p),
        ("wanted_rows", c_void_p), ("num_tokens", c_int64), ("num_sequences", c_int64), ("num_wanted", c_int64),
        ("items", c_void_p), ("num_items", c_int64),
    )  # fmt: skip


class Turns:
    """A lock that alternates: who gives it back and wants it again at once lets the one that waits go first. Plain
    locks don't: a model that was being packed kept others from their steps for a quarter of a second.
    """

    def __init__(self) -> None:
        self._next = threading.Lock()
        """Held by the one that waits longest."""
        self._now = threading.Lock()

    def __enter__(self) -> None:
        with self._next:
            self._now.acquire()

    def __exit__(self, *exception: object) -> None:
        self._now.release()


class Library:
    """The functions of the library, typed. One team of threads for the process, resized by `start`."""

    def __init__(self, path: str) -> None:
        functions = ctypes.CDLL(path)
        assert functions.eh_version() == _VERSION, f"bug: {path} is not what these sources build"
        self.lanes = int(functions.eh_lanes())
        self.block_size = int(functions.eh_block_size())
        self.max_dim = int(functions.eh_max_dim())
        self.float_inputs = bool(functions.eh_float_inputs())
        """Whether bfloat16 weights are multiplied with floats here, not with bfloat16."""
        # asked for now: the system refuses once a thread has a small signal stack
        if functions.eh_tiles() < 0:
            logger.warning("the system refuses this processor's AMX tiles: bfloat16 runs several times slower")
        self.num_threads = 0
        self._team = Turns()
        """Whose turn it is to use the team of threads: models that run, and one that is being packed."""
        self._start = _typed(functions.eh_start, None, c_int)
        self._allocate = _typed(functions.eh_allocate, c_void_p, c_int64)
        self._free = _typed(functions.eh_free, None, c_void_p, c_int64)
        self._packed_elements = _typed(functions.eh_packed_elements, c_int64, c_int64, c_int64)
        self._pack = _typed(
            functions.eh_pack,
            None,
            c_int,
            c_int,
            c_void_p,
            c_int64,
            c_int64,
            c_int64,
            c_int64,
            c_int64,
            c_void_p,
            c_int,
        )
        self._coded_linear = _typed(
            functions.eh_coded_linear, None, POINTER(NativeCodes), c_void_p, c_int, c_int64, c_int64, c_void_p,
            c_void_p, c_int64, c_int,
        )  # fmt: skip
        self._program = _typed(functions.eh_program, c_void_p, POINTER(NativeOperation), c_int64, c_int)
        self._program_free = _typed(functions.eh_program_free, None, c_void_p)
        self._program_run = _typed(functions.eh_program_run, None, c_void_p, POINTER(NativeStep), c_int)

    def start(self, num_threads: int) -> None:
        """Makes the team of threads, unless it has that size already."""
        with self._team:
            if num_threads != self.num_threads:
                self._start(num_threads)
                self.num_threads = num_threads

    def allocate(self, num_bytes: int) -> int:
        """The address of zeroed memory on pages of its own. Raises MemoryError."""
        address = self._allocate(num_bytes)
        if not address:
            raise MemoryError(f"the system refuses {num_bytes} bytes")
        return int(address)

    def free(self, address: int, num_bytes: int) -> None:
        self._free(address, num_bytes)

    def packed_elements(self, out_features: int, in_features: int) -> int:
        return int(self._packed_elements(out_features, in_features))

    def pack(
        self,
        kinds: tuple[NativeType, NativeType],
        source: tuple[int, int],
        outputs: tuple[int, int],
        shape: tuple[int, int],
        packed: int,
        paired: bool,
    ) -> None:
        """`kinds`: packed and source type; `source`: address and row stride; `outputs`: first and number; `paired`:
        the two halves of the outputs alternate by vectors."""
        with self._team:
            self._pack(*kinds, *source, *outputs, *shape, packed, paired)

    def coded_linear(
        self, codes: NativeCodes, x: tuple[int, NativeType, int], rows: int, units: int, y: tuple[int, int]
    ) -> None:
        """`x`: address, type and row stride; `units`: address of room for the rounded rows; `y`: as x, float."""
        if self.num_threads == 0:
            self.start(1)
        with self._team:
            self._coded_linear(codes, *x, rows, units, *y, self.num_threads)

    def program(self, operations: list[NativeOperation], kind: NativeType) -> int:
        array = (NativeOperation * len(operations))(*operations)
        return int(self._program(array, len(operations), kind))

    def program_free(self, program: int) -> None:
        with self._team:
            self._program_free(program)

    def program_run(self, program: int, step: NativeStep, num_threads: int) -> None:
        with self._team:
            self._program_run(program, step, num_threads)


def _typed(function: ctypes._NamedFuncPointer, result: object, *arguments: object) -> ctypes._NamedFuncPointer:
    function.restype = result  # type: ignore[assignment]  # typeshed wants a narrower type than None | class
    function.argtypes = arguments  # type: ignore[assignment]
    return function


@functools.cache
def library() -> Library:
    """Builds it where needed. Raises build.NoKernels."""
    return Library(str(kernel_library()))
