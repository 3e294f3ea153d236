"""CRC-32C, the checksum of TensorFlow's files, with NumPy: hundreds of megabytes per second. It knows no file format.

The polynomial is Castagnoli's, 0x1EDC6F41 (RFC 3720, appendix B.4), here with its bits reversed.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78

# Long input is cut into this many pieces of the same length, which are computed side by side.
_LANES = 1 << 14

Words = NDArray[np.uint32]


def crc32c(content: bytes | memoryview | NDArray[Any], crc: int = 0) -> int:
    """Return the CRC-32C of `content`, which follows bytes with the checksum `crc`.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    data = np.frombuffer(content, dtype=np.uint8)
    length = len(data) // _LANES & ~1  # bytes per lane
    if length >= 64:
        lanes = data[: _LANES * length].reshape(_LANES, length)
        pairs = np.ascontiguousarray(lanes.view("<u2").T)  # (length / 2, lanes): two bytes of each lane at a time
        crcs = np.zeros(_LANES, dtype=np.uint32)
        # The register starts as the complement of the checksum before; only the first lane has bytes before it.
        crcs[0] = crc ^ 0xFFFFFFFF
        table = _two_byte_table()
        for pair in pairs:
            crcs = table[(crcs ^ pair) & 0xFFFF] ^ (crcs >> np.uint32(16))
        crc = _joined(crcs, length) ^ 0xFFFFFFFF
        data = data[_LANES * length :]
    return _of_short(data.tobytes(), crc)


def masked_crc32c(content: bytes | memoryview | NDArray[Any]) -> int:
    """Return the checksum as TensorFlow stores it: rotated and shifted, so that a file of checksums has another one."""
    crc = crc32c(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _of_short(content: bytes, crc: int) -> int:
    table = _byte_table()
    crc ^= 0xFFFFFFFF
    for byte in content:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@functools.cache
def _byte_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table


@functools.cache
def _two_byte_table() -> Words:
    once = np.array(_byte_table(), dtype=np.uint32)
    pairs = np.arange(1 << 16, dtype=np.uint32)
    first = once[pairs & 0xFF] ^ (pairs >> np.uint32(8))
    table: Words = once[first & 0xFF] ^ (first >> np.uint32(8))
    return table


def _joined(crcs: Words, length: int) -> int:
    """Return the register after all lanes of `length` bytes, whose own registers started at 0 except the first."""
    shift = _power(_zero_byte(), length)
    while len(crcs) > 1:
        crcs = _apply(shift, crcs[0::2]) ^ crcs[1::2]
        shift = _apply(shift, shift)
    return int(crcs[0])


def _zero_byte() -> Words:
    """The linear map of the register by a byte of zeros: the image of each of the 32 bits."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    table = np.array(_byte_table(), dtype=np.uint32)
    images: Words = table[bits & 0xFF] ^ (bits >> np.uint32(8))
    return images


def _power(images: Words, exponent: int) -> Words:
    result: Words = np.uint32(1) << np.arange(32, dtype=np.uint32)  # the identity
    while exponent:
        if exponent & 1:
            result = _apply(images, result)
        images = _apply(images, images)
        exponent >>= 1
    return result


def _apply(images: Words, values: Words) -> Words:
    """The linear map with these images of the 32 bits, applied to each of `values`."""
    result = np.zeros_like(values)
    for bit in range(32):
        result ^= np.where(values >> np.uint32(bit) & np.uint32(1), images[bit], np.uint32(0))
    return result
