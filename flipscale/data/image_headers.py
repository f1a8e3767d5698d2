"""What is looked at in an image before a decoder opens it.

Of a TIFF, Pillow makes a Python object of each value of many tags, and of a WebP whole canvases, before anybody can ask
for the size.
"""

import struct
import zlib

# A row of the image may be a strip of its own, with an offset and a length.
MOST_VALUES = 1 << 16
# Pixels of a tile, which is decoded whole however small the image is.
MOST_TILE_PIXELS = 1 << 24

_AS_BYTES = (1, 2, 7)  # types whose values stay one string of bytes: BYTE, ASCII and UNDEFINED
_SHORT = 3
_TILE_SIZES = (322, 323)
_ENTRY_BYTES = 12

MOST_APP_BLOCKS = 1000
# Encoders write blocks of 8 KiB and more.
_MOST_PNG_CHUNKS = 100_000
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_AND_HEADER = _PNG + b"\0\0\0\rIHDR"
# Bits, colour type (grey or RGB), compression, filter and interlacing.
_PLAIN_PNGS = (b"\x08\0\0\0\0", b"\x08\x02\0\0\0")


def complaint(encoded: bytes, most_pixels: int) -> str | None:
    """Return why a TIFF or a WebP should not be opened; None if it may be, or if these bytes are neither."""
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        width, height = _webp_size(encoded)
        return (
            f"{width} x {height} pixels; at most {most_pixels:,} are decoded" if width * height > most_pixels else None
        )
    return _tiff_complaint(encoded)


def _webp_size(encoded: bytes) -> tuple[int, int]:
    """Return width and height as the first chunk says them; nothing of a chunk that is none of WebP's.

    Source: RFC 9649, 2.5 to 2.7.
    """
    kind, content = encoded[12:16], encoded[20:30]
    if kind == b"VP8X":  # after flags of four bytes
        return 1 + int.from_bytes(content[4:7], "little"), 1 + int.from_bytes(content[7:10], "little")
    if kind == b"VP8L":  # after a byte of signature
        bits = int.from_bytes(content[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":  # after a tag and a start code of three bytes each
        return int.from_bytes(content[6:8], "little") & 0x3FFF, int.from_bytes(content[8:10], "little") & 0x3FFF
    return 0, 0


def _tiff_complaint(encoded: bytes) -> str | None:
    if encoded[:2] not in (b"II", b"MM") or not {42, 43} & set(encoded[2:4]):
        return None
    if 43 in encoded[2:4]:
        return "a BigTIFF, which is made for files of more than 4 GB"
    order = "<" if encoded[:2] == b"II" else ">"
    try:
        (first,) = struct.unpack_from(f"{order}L", encoded, 4)
        (count,) = struct.unpack_from(f"{order}H", encoded, first)
        entries = encoded[first + 2 : first + 2 + _ENTRY_BYTES * count]
        tile = 1
        for tag, kind, values, long in struct.iter_unpack(f"{order}HHLL", entries):
            if values > MOST_VALUES and kind not in _AS_BYTES:
                return f"a TIFF whose tag {tag} has {values:,} values; at most {MOST_VALUES:,} are read"
            if tag in _TILE_SIZES:
                tile *= long >> 16 if kind == _SHORT and order == ">" else long & 0xFFFF if kind == _SHORT else long
    except struct.error:
        return None  # cut short, as Pillow will say
    if tile > MOST_TILE_PIXELS:
        return f"a TIFF with tiles of {tile:,} pixels; at most {MOST_TILE_PIXELS:,} are decoded"
    return None


def plain_png_size(encoded: bytes) -> tuple[int, int] | None:
    """Return height and width of a PNG in grey or RGB of 8 bits with nothing between its header and its pixels, as most
    are; None for all others. Pillow would look at nothing more, and for a small image it takes a quarter of the time
    that decoding takes.

    Source: PNG, third edition, 5 and 11.2.1.
    """
    if not encoded.startswith(_PNG_AND_HEADER) or encoded[37:41] != b"IDAT" or encoded[24:29] not in _PLAIN_PNGS:
        return None
    if zlib.crc32(encoded[12:29]) != int.from_bytes(encoded[29:33], "big"):
        return None
    return int.from_bytes(encoded[20:24], "big"), int.from_bytes(encoded[16:20], "big")


def is_png_whole(encoded: bytes) -> bool:
    """Return whether all chunks of a PNG, up to its last, lie within its bytes; True for other formats. OpenCV takes as
    much memory as a chunk says that it needs, up to 4 GB, before it looks whether the file is so long.

    Source: PNG, third edition, 5.3.
    """
    if not encoded.startswith(_PNG):
        return True
    start = len(_PNG)
    for _ in range(_MOST_PNG_CHUNKS):
        end = start + 12 + int.from_bytes(encoded[start : start + 4], "big")
        if end > len(encoded):
            return False
        if encoded[start + 4 : start + 8] == b"IEND":
            return True
        start = end
    return False


def has_one_scan(encoded: bytes) -> bool:
    """Return whether a JPEG is sequential and its first scan has all its channels, so that decoders end with it."""
    start, channels = 2, b"none"
    for _ in range(MOST_APP_BLOCKS):
        if encoded[start : start + 1] != b"\xff" or encoded[start + 1 : start + 2] == b"\xda":
            break
        if encoded[start + 1 : start + 2] in (b"\xc0", b"\xc1"):
            channels = encoded[start + 9 : start + 10]
        start += 2 + int.from_bytes(encoded[start + 2 : start + 4], "big")
    return encoded.startswith(b"\xff\xda", start) and encoded[start + 4 : start + 5] == channels


def has_exif(encoded: bytes) -> bool | None:
    """Return whether one of the APPn blocks at the start of a JPEG is EXIF; most images in shards have none. None if it
    has more than `MOST_APP_BLOCKS`."""
    start = 2
    for _ in range(MOST_APP_BLOCKS):
        if encoded[start : start + 1] != b"\xff" or not 0xE0 <= encoded[start + 1] <= 0xEF:
            return False
        if encoded.startswith(b"Exif\0", start + 4):
            return True
        start += 2 + int.from_bytes(encoded[start + 2 : start + 4], "big")
    return None
