"""The dtypes of safetensors files."""

from __future__ import annotations

__all__ = ["BITS", "DTYPE_NAMES", "KINDS"]

#: The format's name, the bits of an element, and the usual name: in the order of the library's enum ``Dtype``, by which
#: it sorts the tensors that it writes. Several elements of F4 and F6 share a byte: no NumPy dtype has these bytes, and
#: `Manifest.select` refuses them by these names.
_TABLE: tuple[tuple[str, int, str], ...] = (
    ("BOOL", 8, "bool"),
    ("F4", 4, "F4"),
    ("F6_E2M3", 6, "F6_E2M3"),
    ("F6_E3M2", 6, "F6_E3M2"),
    ("U8", 8, "uint8"),
    ("I8", 8, "int8"),
    ("F8_E5M2", 8, "float8_e5m2"),
    ("F8_E4M3", 8, "float8_e4m3fn"),
    ("F8_E8M0", 8, "float8_e8m0fnu"),
    ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
    ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
    ("I16", 16, "int16"),
    ("U16", 16, "uint16"),
    ("F16", 16, "float16"),
    ("BF16", 16, "bfloat16"),
    ("I32", 32, "int32"),
    ("U32", 32, "uint32"),
    ("F32", 32, "float32"),
    ("C64", 64, "complex64"),
    ("F64", 64, "float64"),
    ("I64", 64, "int64"),
    ("U64", 64, "uint64"),
)
#: The bits of an element, by the format's name.
BITS = {kind: bits for kind, bits, _ in _TABLE}
#: The usual names, by the format's.
DTYPE_NAMES = {kind: name for kind, _, name in _TABLE}
#: The format's names, by the usual ones, of dtypes whose elements have whole bytes.
KINDS = {name: kind for kind, bits, name in _TABLE if bits % 8 == 0}
