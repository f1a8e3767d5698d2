"""Attacks on `flipscale prepare shards` of folders: files that nobody would call pictures."""

import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks.attack import Attack, hold
from attacks.preparing import command, images, keeps, picture
from PIL import Image


def beside(spoil: Callable[[Path], object], *flags: str) -> Callable[[Path], list[str]]:
    """Writes four images with captions beside them, then spoils the folder."""

    def make(folder: Path) -> list[str]:
        images(folder)
        for number in range(4):
            (folder / f"in/{number}.txt").write_text(f"picture {number}\n")
        spoil(folder / "in")
        return command("in", *flags)

    return make


def _pipe(folder: Path) -> None:
    (folder / "0.jpg").unlink()
    os.mkfifo(folder / "0.jpg")


def _socket(folder: Path) -> None:
    (folder / "0.jpg").unlink()
    before = os.getcwd()
    os.chdir(folder)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("0.jpg")
    os.chdir(before)


def _link_out(folder: Path) -> None:
    (folder.parent / "secret.jpg").write_bytes(picture(9))
    (folder / "0.jpg").unlink()
    (folder / "0.jpg").symlink_to("../secret.jpg")


def _caption_link_out(folder: Path) -> None:
    (folder.parent / "secret").write_text("password")
    (folder / "0.txt").unlink()
    (folder / "0.txt").symlink_to("../secret")


def _loop(folder: Path) -> None:
    (folder / "0.jpg").unlink()
    (folder / "0.jpg").symlink_to("0.jpg")


def _endless(folder: Path) -> None:
    (folder / "0.jpg").unlink()
    (folder / "0.jpg").symlink_to("/dev/zero")


def _huge(folder: Path) -> None:
    with open(folder / "0.jpg", "ab") as file:
        file.truncate(1 << 34)


def _huge_caption(folder: Path) -> None:
    with open(folder / "0.txt", "ab") as file:
        file.truncate(1 << 33)


def _odd_name(folder: Path) -> None:
    os.rename(folder / "0.jpg", os.fsencode(folder) + b"/caf\xe9.jpg")
    os.rename(folder / "0.txt", os.fsencode(folder) + b"/caf\xe9.txt")


def _wide_bmp(folder: Path) -> None:
    (folder / "0.jpg").write_bytes(picture(0, "BMP", 70_000, 1))
    (folder / "1.jpg").write_bytes(picture(0, "BMP", 70_000, 3))


def _claimed_bmp(folder: Path) -> None:
    header = b"BM" + struct.pack("<IHHI", 54 + 100, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, 70_000, 70_000, 1, 24, 0, 0, 0, 0, 0, 0)
    (folder / "0.jpg").write_bytes(header + bytes(100))


def _gif_bomb(folder: Path) -> None:
    frame = Image.new("P", (4000, 4000))
    frame.save(folder / "0.jpg", "GIF", save_all=True, append_images=[frame] * 3)


def _folder_as_image(folder: Path) -> None:
    (folder / "0.jpg").unlink()
    (folder / "0.jpg").mkdir()


def _json_bomb(folder: Path) -> None:
    (folder / "0.txt").unlink()
    (folder / "0.json").write_text('{"caption": ' + "[" * 100_000 + "]" * 100_000 + "}")


def _dotted(folder: Path) -> None:
    for number, name in enumerate(("a.b.jpg", ".c.jpg", "sub/d e.jpg", "A.B.JPG")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{number}.jpg").rename(folder / name)
        (folder / f"{number}.txt").rename((folder / name).with_suffix(".txt"))


def _two_kinds(folder: Path) -> None:
    (folder / "0.png").write_bytes(picture(7, "PNG"))


def _classes(folder: Path) -> None:
    """Folders of classes: some named from right to left, with a bell, in no UTF-8, and one that is no folder."""
    for number, name in enumerate((b"a class", "\u202e\u05d0 \u0007".encode(), b"caf\xe9", b"c")):
        (folder / f"{number}.txt").unlink()
        place = os.fsencode(folder) + b"/" + name
        os.mkdir(place)
        os.rename(folder / f"{number}.jpg", place + b"/0.jpg")
    (folder / "d.jpg").symlink_to("/dev/zero")


def _no_captions(folder: Path) -> None:
    for number in range(4):
        (folder / f"{number}.txt").unlink()


def _to_its_source(folder: Path) -> list[str]:
    make = beside(lambda folder: None)
    make(folder)
    return ["prepare", "shards", "in", "in", "--num_workers", "1"]


ATTACKS: list[Attack] = [
    Attack("a pipe among the images", beside(_pipe), check=keeps(3, unreadable_file=1)),
    Attack("a socket among the images", beside(_socket), check=keeps(3, unreadable_file=1)),
    Attack("a link out of the folder", beside(_link_out), check=keeps(3, outside_folder=1)),
    Attack("a caption that is a link out of the folder", beside(_caption_link_out), check=keeps(3, outside_folder=1)),
    Attack("a link to itself", beside(_loop), check=keeps(3, unreadable_file=1)),
    Attack("a link to /dev/zero", beside(_endless, "--allow_outside"), check=keeps(3, unreadable_file=1)),
    Attack("an image of 16 GB", beside(_huge), check=keeps(3, sample_too_large=1)),
    Attack("a caption of 8 GB", beside(_huge_caption), check=keeps(3, sample_too_large=1)),
    Attack("a name that is no UTF-8", beside(_odd_name), check=keeps(3, unreadable_file=1)),
    Attack("BMPs of 70,000 x 1 pixels", beside(_wide_bmp), check=keeps(2, undecodable_image=2)),
    Attack("an animation of 16 million pixels a frame", beside(_gif_bomb), check=keeps(4)),
    Attack("a BMP that says it has 70,000 x 70,000 pixels", beside(_claimed_bmp), check=keeps(3, image_too_large=1)),
    Attack("a folder that is called like an image", beside(_folder_as_image), check=keeps(3, unreadable_file=1)),
    Attack("captions nested 100,000 deep beside an image", beside(_json_bomb), check=keeps(3, undecodable_caption=1)),
    Attack("names with dots, blanks and capitals", beside(_dotted), check=keeps(4)),
    Attack(
        "folders of classes with odd names", beside(_classes), check=keeps(3, undecodable_caption=1, missing_caption=1)
    ),
    Attack("pictures without captions", beside(_no_captions), code=2, says=("4 images and no captions",)),
    Attack("a path that is misspelled", lambda folder: command("no/such/folder"), code=2, says=("does not exist",)),
    Attack("a JPEG and a PNG of one name", beside(_two_kinds), check=keeps(5)),
    Attack("shards to their source", _to_its_source, code=2, says=("`prepare shards` did not write",)),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
