"""Reads W&B's offline files: records of protobuf in LevelDB's log format, without its checksums.

After a header of 7 bytes there are blocks of 32 KiB; a record is cut at their ends into pieces, each with a header of
checksum (4 bytes), length (2) and whether it is the whole, the first, a middle or the last piece (1).
"""

import struct
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER, PIECE = 32 * 1024, 7, struct.Struct("<IHB")
WHOLE, LAST = 1, 4


def records(path: Path) -> list[Record]:
    """Return all records of a file that was closed."""
    content = path.read_bytes()
    assert content.startswith(b":W&B")
    read = []
    pieces = b""
    at = HEADER
    while at < len(content):
        if BLOCK - at % BLOCK < PIECE.size:
            at += BLOCK - at % BLOCK  # the rest of a block is padding
            continue
        _, length, kind = PIECE.unpack_from(content, at)
        at += PIECE.size
        pieces += content[at : at + length]
        at += length
        if kind in (WHOLE, LAST):
            read.append(Record.FromString(pieces))
            pieces = b""
    return read
