"""Attacks on `flipscale prepare shards` of folders: odd files among the pictures."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

from attacks.attack import Attack, Change, Ended, later, refused, survived, test_of
from attacks.changes import instead, nothing, unix_socket
from attacks.preparing import command, images, keeps, picture
from PIL import Image


def row(name: str, spoil: Change, check: Callable[[Path, Ended], None], *flags: str) -> Attack:
    """Four images with captions next to them, in a folder that `spoil` changes."""
    return survived(name, beside(spoil, *flags), check=check)


@later
def beside(folder: Path, spoil: Change, *flags: str) -> list[str]:
    images(folder)
    for number in range(4):
        (folder / f"in/{number}.txt").write_text(f"picture {number}\n")
    spoil(folder / "in")
    return command("in", *flags)


def link(target: str) -> Change:
    return lambda path: path.symlink_to(target)


def link_out(path: Path) -> None:
    secret = path.parents[1] / f"secret{path.suffix}"
    secret.write_bytes(picture(9) if path.suffix == ".jpg" else b"password")
    path.symlink_to(f"../{secret.name}")


def grown(name: str, size: int) -> Change:
    return lambda folder: os.truncate(folder / name, size)


def odd_name(folder: Path) -> None:
    for ending in ("jpg", "txt"):
        os.rename(folder / f"0.{ending}", os.fsencode(folder) + b"/caf\xe9." + ending.encode())


def wide_bmp(folder: Path) -> None:
    (folder / "0.jpg").write_bytes(picture(0, "BMP", 70_000, 1))
    (folder / "1.jpg").write_bytes(picture(0, "BMP", 70_000, 3))


def claimed_bmp(path: Path) -> None:
    header = b"BM" + struct.pack("<IHHI", 54 + 100, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, 70_000, 70_000, 1, 24, 0, 0, 0, 0, 0, 0)
    path.write_bytes(header + bytes(100))


def gif_bomb(path: Path) -> None:
    frame = Image.new("P", (4000, 4000))
    frame.save(path, "GIF", save_all=True, append_images=[frame] * 3)


def json_bomb(path: Path) -> None:
    path.with_suffix(".json").write_text('{"caption": ' + "[" * 100_000 + "]" * 100_000 + "}")


def dotted(folder: Path) -> None:
    for number, name in enumerate(("a.b.jpg", ".c.jpg", "sub/d e.jpg", "A.B.JPG")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{number}.jpg").rename(folder / name)
        (folder / f"{number}.txt").rename((folder / name).with_suffix(".txt"))


def classes(folder: Path) -> None:
    """Folders of classes with odd names, and a link next to them."""
    without_captions(folder)
    for number, name in enumerate((b"a class", "\u202e\u05d0 \u0007".encode(), b"caf\xe9", b"c")):
        place = os.fsencode(folder) + b"/" + name
        os.mkdir(place)
        os.rename(folder / f"{number}.jpg", place + b"/0.jpg")
    (folder / "d.jpg").symlink_to("/dev/zero")


def without_captions(folder: Path) -> None:
    for number in range(4):
        (folder / f"{number}.txt").unlink()


def to_its_source(folder: Path) -> list[str]:
    beside(nothing)(folder)
    return ["prepare", "shards", "in", "in", "--num_workers", "1"]


UNREADABLE = keeps(3, unreadable_file=1)
OUTSIDE = keeps(3, outside_folder=1)
TOO_LARGE = keeps(3, sample_too_large=1)
ATTACKS: list[Attack] = [
    row("a pipe among the images", instead(os.mkfifo, "0.jpg"), UNREADABLE),
    row("a socket among the images", instead(unix_socket, "0.jpg"), UNREADABLE),
    row("a link out of the folder", instead(link_out, "0.jpg"), OUTSIDE),
    row("a caption that is a link out of the folder", instead(link_out, "0.txt"), OUTSIDE),
    row("a link to itself", instead(link("0.jpg"), "0.jpg"), UNREADABLE),
    row("a link to /dev/zero", instead(link("/dev/zero"), "0.jpg"), UNREADABLE, "--allow_outside"),
    row("an image of 16 GB", grown("0.jpg", 1 << 34), TOO_LARGE),
    row("a caption of 8 GB", grown("0.txt", 1 << 33), TOO_LARGE),
    row("a name that is no UTF-8", odd_name, UNREADABLE),
    row("BMPs of 70,000 x 1 pixels", wide_bmp, keeps(2, undecodable_image=2)),
    row("an animation of 16 million pixels a frame", instead(gif_bomb, "0.jpg"), keeps(4)),
    row("a BMP that says it has 70,000 x 70,000 pixels", instead(claimed_bmp, "0.jpg"), keeps(3, image_too_large=1)),
    row("a folder that is called like an image", instead(Path.mkdir, "0.jpg"), UNREADABLE),
    row("captions nested 100,000 deep beside an image", instead(json_bomb, "0.txt"), keeps(3, undecodable_caption=1)),
    row("names with dots, blanks and capitals", dotted, keeps(4)),
    row("folders of classes with odd names", classes, keeps(3, undecodable_caption=1, missing_caption=1)),
    refused("pictures without captions", beside(without_captions), "4 images"),
    refused("a path that is misspelled", lambda folder: command("no/such/folder"), "no/such/folder"),
    row("a JPEG and a PNG of one name", lambda f: (f / "0.png").write_bytes(picture(7, "PNG")), keeps(5)),
    refused("shards to their source", to_its_source, "in"),
]

test_attack = test_of(ATTACKS)
