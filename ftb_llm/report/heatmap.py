"""Policy beside target as pictures: one pixel per completion, enlarged by the browser."""

import base64
import struct
import zlib
from collections.abc import Sequence

PALETTE = ((68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37))  # dark is rare, bright is likely


def heat_png(values: Sequence[float], rows: int, columns: int, highest: float) -> str:
    """A `data:` address of a PNG with one pixel per value; colour grows with the square root of value / highest."""
    assert len(values) == rows * columns, (len(values), rows, columns)
    pixels = [colour((value / highest) ** 0.5 if highest > 0 and value > 0 else 0.0) for value in values]
    return png_address(pixels, rows, columns)


def legend_png(columns: int = 128) -> str:
    return png_address([colour(index / (columns - 1)) for index in range(columns)], 1, columns)


def colour(share: float) -> tuple[int, int, int]:
    """A colour of the palette; `share` runs from 0 to 1 and is cut off there."""
    place = min(max(share, 0.0), 1.0) * (len(PALETTE) - 1)
    index = min(int(place), len(PALETTE) - 2)
    part = place - index
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(PALETTE[index], PALETTE[index + 1], strict=True))
    return red, green, blue


def png_address(pixels: Sequence[tuple[int, int, int]], rows: int, columns: int) -> str:
    lines = b"".join(b"\0" + bytes(value for pixel in pixels[row * columns : (row + 1) * columns] for value in pixel) for row in range(rows))
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)  # 8 bits per channel, RGB
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines, 9)) + _chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
