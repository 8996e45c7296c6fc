"""Tensors as the Open Inference Protocol writes them: raw bytes, or lists of values in JSON and in gRPC messages.

An array's dtype says its datatype; BYTES are object arrays of bytes. What came in is bounded by what was sent: a
shape is only believed when the data has its size.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from services.inference import BadInput
from tsm_core.errors import CallerError

Array = np.ndarray[Any, Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype("O"),
}
DATATYPES = {dtype: name for name, dtype in DTYPES.items()}
ELEMENTS: dict[str, tuple[set[type], str]] = {  # Python types by dtype.kind, and their name for people
    "b": ({bool}, "booleans"),
    "u": ({int}, "integers"),
    "i": ({int}, "integers"),
    "f": ({int, float}, "numbers"),
    "O": ({str, bytes}, "strings"),
}
MAX_RANK = 8
MAX_ELEMENTS = 2**40  # what a shape may claim; the data decides
LENGTH = struct.Struct("<I")  # in front of every element of raw BYTES


class NotJson(CallerError):
    """An output that JSON cannot carry."""

    reason = "not_json"


def datatype_of(array: Array) -> str:
    """The protocol's name of an array's datatype."""
    return DATATYPES[array.dtype]


def from_raw(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> Array:
    """The tensor in `data`, little-endian and row-major; read-only, without a copy where the datatype allows it.

    Raises BadInput when the size is not the shape's, an element is cut off, or a float is not finite.
    """
    dtype, count = _expected(name, datatype, shape)
    if dtype.kind == "O":
        elements = _split(name, data)
        _check_count(name, shape, count, len(elements))
        return _objects(elements).reshape(shape)
    if len(data) != count * dtype.itemsize:
        raise BadInput(
            f"input {name!r} came with {len(data)} bytes; {datatype} {list(shape)} has {count * dtype.itemsize}"
        )
    if dtype.kind == "b":
        return np.not_equal(np.frombuffer(data, np.uint8), 0).reshape(shape)
    return _finite(name, np.frombuffer(data, dtype)).reshape(shape)


def to_raw(array: Array) -> bytes:
    """The tensor's bytes, little-endian and row-major."""
    if array.dtype.kind == "O":
        return b"".join(chain.from_iterable((LENGTH.pack(len(one)), one) for one in array.ravel()))
    return array.tobytes()


def from_values(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Array:
    """The tensor from its elements in row-major order; text becomes UTF-8.

    Raises BadInput when their number, their type or their range is not the datatype's, or a float is not finite.
    """
    dtype, count = _expected(name, datatype, shape)
    _check_count(name, shape, count, len(values))
    types, called = ELEMENTS[dtype.kind]
    if not set(map(type, values)) <= types:
        raise BadInput(f"input {name!r} is {datatype}: its elements must be {called}")
    try:
        if dtype.kind == "O":
            return _objects([one.encode() if isinstance(one, str) else one for one in values]).reshape(shape)
        with np.errstate(over="ignore"):  # what overflows is infinite, and refused as such
            return _finite(name, np.array(values, dtype)).reshape(shape)
    except (OverflowError, UnicodeEncodeError):
        raise BadInput(f"input {name!r} has an element that is no {datatype}") from None


def from_json(name: str, datatype: str, shape: Sequence[int], data: list[Any]) -> Array:
    """The tensor from a flat or nested list. Raises BadInput as `from_values` does."""
    for _ in range(len(shape) - 1):
        if not data or type(data[0]) is not list:
            break
        if set(map(type, data)) != {list}:
            raise BadInput(f"input {name!r} mixes lists and elements at one depth")
        data = list(chain.from_iterable(data))
    return from_values(name, datatype, shape, data)


def to_json(name: str, array: Array) -> list[Any]:
    """The tensor's elements in row-major order; floats are exact. Raises NotJson."""
    if array.dtype.kind == "O":
        try:
            return [one.decode() for one in array.ravel()]
        except UnicodeDecodeError:
            raise NotJson(f"output {name!r} is not UTF-8 text; ask for it with binary_data") from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise NotJson(f"output {name!r} has values that are not finite; ask for it with binary_data")
    values: list[Any] = array.ravel().tolist()
    return values


def _expected(name: str, datatype: str, shape: Sequence[int]) -> tuple[np.dtype[Any], int]:
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise BadInput(f"input {name!r} has datatype {datatype!r}; known are {', '.join(DTYPES)}")
    if len(shape) > MAX_RANK or any(side < 0 for side in shape) or math.prod(max(s, 1) for s in shape) > MAX_ELEMENTS:
        raise BadInput(f"input {name!r} cannot have the shape {list(shape)[: MAX_RANK + 1]}")
    return dtype, math.prod(shape)


def _check_count(name: str, shape: Sequence[int], count: int, came: int) -> None:
    if came != count:
        raise BadInput(f"input {name!r} came with {came} elements; the shape {list(shape)} has {count}")


def _finite(name: str, array: Array) -> Array:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadInput(f"input {name!r} has values that are not finite")
    return array


def _split(name: str, data: bytes | memoryview) -> list[bytes]:
    elements: list[bytes] = []
    at = 0
    while at < len(data):
        begin = at + LENGTH.size
        end = begin + LENGTH.unpack_from(data, at)[0] if begin <= len(data) else begin
        if end > len(data):
            raise BadInput(f"input {name!r} is cut off: element {len(elements)} ends at byte {end} of {len(data)}")
        elements.append(bytes(data[begin:end]))
        at = end
    return elements


def _objects(elements: Sequence[bytes]) -> Array:
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return array
