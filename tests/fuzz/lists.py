"""The bytes of a CSV, TSV or JSON-lines list, or of a parquet table, beside two good images."""

import io
from contextlib import suppress
from pathlib import Path

from PIL import Image

from flipscale.data.samples import BadSample
from flipscale.preparation.lists import open_pairs

_KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
_ROWS = 200


def _picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


_IMAGE = _picture()
# Of a file that is not in the list's folder.
_OUTSIDE = b"nobody may read this"


def seeds() -> list[bytes]:
    """Lists of each kind; the first byte chooses it."""
    import pyarrow
    import pyarrow.parquet

    table = io.BytesIO()
    columns = {"path": ["0.png", "1.png"], "text": ["one", "two"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), table, row_group_size=1)
    return [
        b'\0file_name,caption\n0.png,"one, and\n""more"" of it"\n1.png,two\n"',
        b'\0\xef\xbb\xbfcaption,image,x\r\n"one",0.png,\r\n"two,1.png\r\n',
        b'\1path\ttext\n0.png\tone\n../2.png\t"two"\n',
        b'\2{"file_name": "0.png", "captions": ["one", null]}\n{"file_name": "1.png", "captions": 7}\n[]\n',
        b"\3" + table.getvalue(),
    ]


def attack(data: bytes, folder: Path) -> None:
    """Open the list and read its first rows. What is read is in the folder; a parquet's cells may hold images."""
    folder = folder / "in"
    folder.mkdir()
    (folder.parent / "2.png").write_bytes(_OUTSIDE)
    for number in range(2):
        (folder / f"{number}.png").write_bytes(_IMAGE)
    file = folder / f"list{_KINDS[data[0] % len(_KINDS) if data else 0]}"
    file.write_bytes(data[1:])
    try:
        pairs = open_pairs(str(file))
    except ValueError:
        return
    pairs.fingerprint()
    for number in range(min(len(pairs), _ROWS)):
        pairs.key(number)
        with suppress(BadSample):
            assert all(caption.strip() for caption in pairs.captions(number))
        with suppress(BadSample):
            image = pairs.image(number)
            assert image in (_IMAGE, file.read_bytes()) or (file.suffix == ".parquet" and image != _OUTSIDE)
