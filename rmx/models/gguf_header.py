"""Whether a GGUF file is whole, by its header: transformers' reader fails in many ways where it is not."""

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

from rmx.models.source import ModelError

VERSIONS = (2, 3)
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of each kind of value
STRING, ARRAY, UINT32 = 8, 9, 4
ALIGNMENT = "general.alignment"


def check(path: Path) -> None:
    """Raise ModelError unless the file is a GGUF file that holds all that its header announces."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path}: expected a GGUF file, got one without the GGUF header")
            version, tensors, pairs = _read(file, "<IQQ")
            if version not in VERSIONS:
                raise ModelError(f"{path}: GGUF version {version}; expected {' or '.join(map(str, VERSIONS))}")
            alignment = 32
            for _ in range(pairs):
                key, (kind,) = _string(file), _read(file, "<I")
                if key == ALIGNMENT.encode() and kind == UINT32:
                    (alignment,) = _read(file, "<I")
                else:
                    _skip(file, kind, size)
            ends = [0]
            for _ in range(tensors):
                _string(file)
                (dimensions,) = _read(file, "<I")
                shape = _read(file, f"<{min(dimensions, 8)}Q")
                kind, offset = _read(file, "<IQ")
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
                ends.append(offset + math.prod(shape) // block * block_bytes)
            need = math.ceil(file.tell() / max(alignment, 1)) * alignment + max(ends)
        except (EOFError, struct.error) as fault:
            raise ModelError(f"{path}: is truncated in its metadata, at {size:,} bytes: download it again") from fault
        except (ValueError, KeyError, OverflowError, MemoryError) as fault:
            if isinstance(fault, ModelError):
                raise
            raise ModelError(f"{path}: its metadata cannot be parsed: {fault}") from fault
    if size < need:
        raise ModelError(f"{path}: is truncated: it has {size:,} of {need:,} bytes: download it again")


def _read(file: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _string(file: BinaryIO) -> bytes:
    (length,) = _read(file, "<Q")
    if length > 1 << 20:
        raise ValueError(f"a name of {length:,} bytes")
    found = file.read(length)
    if len(found) < length:
        raise EOFError
    return found


def _skip(file: BinaryIO, kind: int, size: int) -> None:
    """Past one value."""
    if kind == STRING:
        (length,) = _read(file, "<Q")
        _forward(file, length, size)
    elif kind == ARRAY:
        inner, count = _read(file, "<IQ")
        if inner in SCALARS:
            _forward(file, SCALARS[inner] * count, size)
        else:
            for _ in range(count):
                _skip(file, inner, size)
    else:
        _forward(file, SCALARS[kind], size)


def _forward(file: BinaryIO, count: int, size: int) -> None:
    if file.tell() + count > size:
        raise EOFError
    file.seek(count, os.SEEK_CUR)
