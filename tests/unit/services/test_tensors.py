"""The codec of the Open Inference Protocol: every datatype by every way, and what is refused."""

import json
import struct

import numpy as np
import pytest

from services.inference import BadInput
from services.tensors import DTYPES, NotJson, datatype_of, from_json, from_raw, from_values, to_json, to_raw

ROUNDS = 40


def random_tensor(datatype: str, random: np.random.Generator) -> np.ndarray:
    shape = tuple(int(side) for side in random.integers(0, 5, int(random.integers(0, 5))))
    dtype = DTYPES[datatype]
    if datatype == "BYTES":
        count = int(np.prod(shape, dtype=int))
        array = np.empty(count, object)
        array[:] = ["é€𝄞x\x00"[: random.integers(0, 6)].encode() for _ in range(count)]
        return array.reshape(shape)
    size = (*shape, max(dtype.itemsize, 1))
    bits = random.integers(0, 256, size, dtype=np.uint8)
    if dtype.kind == "b":
        return (bits[..., 0] % 2).astype(bool)
    array = np.ascontiguousarray(bits).view(dtype)[..., 0]
    if dtype.kind == "f":
        array = np.where(np.isfinite(array), array, dtype.type(0.1))
    return array.reshape(shape).astype(dtype)


@pytest.mark.parametrize("datatype", DTYPES)
def test_every_tensor_comes_back_to_the_bit_by_every_way(datatype: str):
    random = np.random.default_rng(list(datatype.encode()))
    for _ in range(ROUNDS):
        array = random_tensor(datatype, random)
        assert datatype_of(array) == datatype
        text = json.loads(json.dumps(to_json("x", array)))
        for back in (
            from_raw("x", datatype, array.shape, to_raw(array)),
            from_raw("x", datatype, array.shape, memoryview(to_raw(array))),
            from_json("x", datatype, array.shape, text),
            from_json("x", datatype, array.shape, np.array(text, object).reshape(array.shape).tolist())
            if array.ndim
            else from_json("x", datatype, (), text),
            from_values("x", datatype, array.shape, array.ravel().tolist()),
        ):
            assert (back.dtype, back.shape) == (array.dtype, array.shape)
            assert to_raw(back) == to_raw(array)


def test_raw_bytes_are_little_endian_and_row_major():
    assert to_raw(np.array([[1, 2], [3, 256]], "<u2")) == bytes([1, 0, 2, 0, 3, 0, 0, 1])
    assert to_raw(np.array([[1, 2], [3, 4]], "u1").T) == bytes([1, 3, 2, 4])
    assert to_raw(np.array([b"ab", b""], object)) == b"\x02\0\0\0ab\0\0\0\0"


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "told"),
    [
        ("FP32", (2,), b"\0" * 7, "7 bytes"),
        ("FP32", (2**62, 4), b"", "cannot have the shape"),
        ("FP32", (0, 2**62), b"", "cannot have the shape"),
        ("FP32", (-1,), b"", "cannot have the shape"),
        ("UINT8", (1,) * 9, b"\0", "cannot have the shape"),
        ("FP32", (1,), struct.pack("<f", float("nan")), "not finite"),
        ("FP16", (1,), struct.pack("<e", float("inf")), "not finite"),
        ("BF16", (1,), b"\0\0", "'BF16'; known are"),
        ("BYTES", (1,), b"\x05\0\0\0ab", "cut off"),
        ("BYTES", (1,), b"\x05\0", "cut off"),
        ("BYTES", (2,), b"\0\0\0\0", "1 elements"),
    ],
)
def test_raw_data_that_is_refused(datatype: str, shape: tuple[int, ...], data: bytes, told: str):
    with pytest.raises(BadInput, match=told):
        from_raw("x", datatype, shape, data)


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "told"),
    [
        ("FP32", (2,), [1.0], "1 elements"),
        ("FP32", (1,), [1e39], "not finite"),
        ("FP32", (1,), [10**400], "no FP32"),
        ("FP32", (1,), ["1"], "must be numbers"),
        ("FP32", (1,), [True], "must be numbers"),
        ("FP32", (1,), [None], "must be numbers"),
        ("INT8", (1,), [128], "no INT8"),
        ("UINT64", (1,), [-1], "no UINT64"),
        ("UINT8", (1,), [1.5], "must be integers"),
        ("BOOL", (1,), [1], "must be booleans"),
        ("BYTES", (1,), ["\ud800"], "no BYTES"),
        ("BYTES", (1,), [1], "must be strings"),
        ("FP32", (2, 1), [[1.0], 2.0], "mixes"),
        ("FP32", (2,), [[1.0], [2.0]], "must be numbers"),
    ],
)
def test_lists_that_are_refused(datatype: str, shape: tuple[int, ...], data: list, told: str):
    with pytest.raises(BadInput, match=told):
        from_json("x", datatype, shape, data)


@pytest.mark.parametrize("array", [np.array([np.nan], "f4"), np.array([b"\xff"], object)])
def test_what_json_cannot_carry_is_said(array: np.ndarray):
    with pytest.raises(NotJson, match="binary_data"):
        to_json("x", array)
