"""Reading GGUF: header and metadata here, tensor data as views of the mapped file.

    "GGUF" | version | tensors | keys | key, type, value ... | name, shape, type, offset ... | data

The `gguf` library's own reader takes 3.0 s for a vocabulary of 49,152 (a numpy view per string),
this one 0.1 s, and the front end needs it too, for the tokenizer. Block formats are the library's.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu_service.model.bounds import shown

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_MAX_DIMENSIONS = 4
_MAX_ARRAYS = 4
"""Within each other."""
_MAX_ALIGNMENT = 1 << 20
_MAX_ELEMENTS = 1 << 48
"""Of a tensor: their bytes are a number of 64 bits."""


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is in numpy's order (rows first)."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


class GgufFile:
    """A mapped GGUF file, version 2 or 3, little-endian. ValueError if it is not a whole one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes: npt.NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the GGUF file {path}: {error}") from error
        cursor = _Cursor(self._bytes.data)
        try:
            self._parse(cursor)
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a whole GGUF file: its header is damaged") from error

    def _parse(self, cursor: _Cursor) -> None:
        if cursor.take(4) != _MAGIC:
            raise ValueError(f"{self.path} is not a GGUF file")
        version = cursor.scalar(4)
        if version not in (2, 3):
            raise ValueError(
                f"{self.path} is GGUF version {version}; versions 2 and 3 are supported"
            )
        tensor_count, key_count = cursor.scalar(10), cursor.scalar(10)
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar(4))
        self.tensors: dict[str, GgufTensor] = {}
        for _ in range(tensor_count):
            tensor = cursor.tensor()
            self.tensors[tensor.name] = tensor
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT:
            raise ValueError(f"{self.path}: general.alignment is {shown(alignment)}")
        self._data_start = -(-cursor.position // alignment) * alignment

    def dequantised(self, name: str) -> npt.NDArray[Any]:
        """The tensor as fp32 `[shape]`, or fp16 where it is stored so (a view of the file)."""
        # Imported here: the front end reads metadata only, and must start fast.
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        tensor = self.tensors[name]
        try:
            kind = GGMLQuantizationType(tensor.ggml_type)
        except ValueError as error:
            raise ValueError(
                f"tensor {name} of {self.path} has the unknown GGML type {tensor.ggml_type}"
            ) from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if tensor.shape[-1] % block:
            raise ValueError(f"tensor {name} of {self.path} has rows that are not whole blocks")
        if not 0 < math.prod(tensor.shape) <= _MAX_ELEMENTS:
            raise ValueError(f"tensor {name} of {self.path} has the shape {list(tensor.shape)}")
        row_bytes = tensor.shape[-1] // block * block_bytes
        rows = math.prod(tensor.shape[:-1])
        start = self._data_start + tensor.offset
        raw = self._bytes[start : start + rows * row_bytes]
        if raw.size != rows * row_bytes:
            raise ValueError(f"{self.path} is truncated: tensor {name} lies past its end")
        if kind == GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(tensor.shape)
        if kind == GGMLQuantizationType.F16:
            return raw.view(np.float16).reshape(tensor.shape)
        try:
            values: npt.NDArray[Any] = dequantize(raw.reshape(rows, row_bytes), kind)
        except NotImplementedError as error:
            raise ValueError(
                f"tensor {name} of {self.path} is {kind.name}, which is not supported"
            ) from error
        return values.reshape(tensor.shape)


class _Cursor:
    """Reads the header from front to back; running past the end is struct.error or IndexError."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        piece = self._data[self.position : self.position + count]
        if len(piece) != count:
            raise IndexError("past the end")
        self.position += count
        return bytes(piece)

    def scalar(self, kind: int) -> Any:
        form = _SCALARS.get(kind)
        if form is None:
            raise IndexError(f"value type {kind}")
        (value,) = form.unpack_from(self._data, self.position)
        self.position += form.size
        return value

    def string(self) -> str:
        return self.take(self.scalar(10)).decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(kind)
        if depth == _MAX_ARRAYS:
            raise IndexError("arrays within arrays")
        element, count = self.scalar(4), self.scalar(10)
        if element == _STRING:
            return [self.string() for _ in range(count)]
        if element == _ARRAY:
            return [self.value(_ARRAY, depth + 1) for _ in range(count)]
        form = _SCALARS.get(element)
        if form is None:
            raise IndexError(f"value type {element}")
        return [value for (value,) in form.iter_unpack(self.take(count * form.size))]

    def tensor(self) -> GgufTensor:
        name = self.string()
        dimensions = self.scalar(4)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise IndexError(f"{dimensions} dimensions")
        shape = tuple(self.scalar(10) for _ in range(dimensions))
        return GgufTensor(name, shape[::-1], ggml_type=self.scalar(4), offset=self.scalar(10))
