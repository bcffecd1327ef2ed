"""What the kernels are handed, field by field as delta.h has it."""

from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_void_p

from deltaserve.kernels.codes import BITS

CODECS = tuple(BITS)
"""In the order of delta.h's ``Codec``."""


class CodesStruct(Structure):
    """``Codes`` of delta.h."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("length", c_int64),
        ("line_bytes", c_int64),
        ("group", c_int64),
        ("codec", c_int32),
        ("unused", c_int32),
    )


class PartStruct(Structure):
    """``Part`` of delta.h."""

    _fields_ = (
        ("kind", c_int32),
        ("block", c_int32),
        ("wide_columns", c_int32),
        ("gain", c_float),
        ("kept", c_int64),
        ("columns", c_void_p),
        ("factors", c_void_p),
        ("a", CodesStruct),
        ("b", CodesStruct),
        ("ids", c_void_p),
        ("mean", c_void_p),
        ("mean_rows", c_int64),
    )


class LayerStruct(Structure):
    """``Layer`` of delta.h."""

    _fields_ = (
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("deltas", c_void_p),
        ("biases", c_void_p),
        ("slots", c_int64),
        ("rows", c_int64),
        ("width", c_int64),
        ("codec", c_int32),
        ("unused", c_int32),
    )


class DeltaStruct(Structure):
    """``Delta`` of delta.h."""

    _fields_ = (
        ("rows", c_int64),
        ("width", c_int64),
        ("parts", c_void_p),
        ("count", c_int64),
        ("cycles", c_double),
    )


class MatrixStruct(Structure):
    """``Matrix`` of delta.h."""

    _fields_ = (
        ("data", c_void_p),
        ("stride", c_int64),
        ("rows", c_int64),
        ("width", c_int64),
        ("dtype", c_int32),
        ("unused", c_int32),
    )


class SwapStruct(Structure):
    """``Swap`` of delta.h."""

    _fields_ = (("weight", MatrixStruct), ("delta", c_void_p), ("saved", c_void_p))
