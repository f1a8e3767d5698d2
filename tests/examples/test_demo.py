"""The demo's data: names, selection, parts and files, on made-up drawings."""

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from examples.demo import data as demo
from examples.demo.data import Drawing, IconSet, Names, Picture, select_drawings
from examples.shared import download, slug
from flipscale.data.sources.tar import TarSource

ENTRIES = [
    {"label": "grinning face", "hexcode": "1F600", "group": 0, "subgroup": 0},
    {"label": "red heart", "hexcode": "2764-FE0F", "group": 0, "subgroup": 0},
    {"label": "admission tickets", "hexcode": "1F39F-FE0F", "group": 6, "subgroup": 61},
    {"label": "waving hand", "hexcode": "1F44B", "group": 0, "subgroup": 0},
    {"label": "police car light", "hexcode": "1F6A8"},
    {"label": "flag: Côte d\u2019Ivoire", "hexcode": "1F1E8-1F1EE", "group": 9, "subgroup": 0},
    {"label": "chequered flag", "hexcode": "1F3C1", "group": 9, "subgroup": 0},
]
KINDS = {
    "groups": {"0": "smileys-emotion", "6": "activities", "9": "flags"},
    "subgroups": {"0": "face-smiling", "61": "award-medal"},
}
BODY = {"body": '<circle cx="8" cy="8" r="6" fill="#d02020"/>'}
THINGS = [
    f"{colour} {shape}" for colour in ("red", "green", "blue", "black") for shape in ("disc", "ring", "star", "bar")
]


def captions(icons: dict[str, Any], code_points: dict[str, str] | None = None, **options: Any) -> dict[str, str]:
    """Icon -> caption of the selected drawings."""
    drawings = select_drawings("artist", icons, code_points or {}, Names(ENTRIES, KINDS), **options)
    return {drawing.icon: drawing.caption for drawing in drawings}


def test_captions_come_from_code_points_names_and_aliases() -> None:
    names = ["by-code", "grinning-face", "old-name", "admissiontickets", "flag-for-cote-divoire"]
    names += ["flag-for-chequered-flag", "two-word-icon"]
    icons = {
        "icons": dict.fromkeys(names, BODY),
        # A mirrored alias is another drawing.
        "aliases": {"red-heart": {"parent": "old-name"}, "waving-hand": {"parent": "two-word-icon", "hFlip": True}},
    }
    expected = ["waving hand", "grinning face", "red heart", "admission tickets", "flag: Côte d\u2019Ivoire"]
    expected += ["chequered flag", "two word icon"]
    assert captions(icons, {"23-20e3": "unused", "1f44b": "by-code"}) == dict(zip(names, expected, strict=True))


def test_hidden_icons_skin_tones_and_flags_are_left_out() -> None:
    tones = ["waving-hand", "waving-hand-light", "waving-hand-dark-skin-tone", "police-car-light"]
    icons = {"icons": {"grinning-face": {**BODY, "hidden": True}, **dict.fromkeys(tones, BODY)}}
    code_points = {"1f44b": "waving-hand", "1f44b-1f3fb": "waving-hand-light", "1f6a8": "police-car-light"}
    assert list(captions(icons, code_points)) == ["waving-hand", "police-car-light"]
    icons = {"icons": dict.fromkeys(["flag-for-nowhere", "chequered-flag", "red-heart"], BODY)}
    assert list(captions(icons, flags=False)) == ["red-heart"]
    assert len(captions(icons)) == 3


def test_drawings_keep_their_shape_and_group() -> None:
    icons = {
        "icons": {
            "admission-tickets": {"body": '<path fill="#ff0000" d="M0 0h32v16H0z"/>', "width": 32, "height": 16},
            "odd": BODY,
        }
    }
    wide, odd = select_drawings("artist", icons, {}, Names(ENTRIES, KINDS))
    pixels = cv2.imdecode(np.frombuffer(demo.render_svg(wide.svg), np.uint8), cv2.IMREAD_COLOR)
    assert pixels.shape == (64, 64, 3)
    assert (pixels[32, 32].tolist(), pixels[4, 32].tolist()) == ([0, 0, 255], [255, 255, 255])
    assert (wide.group, wide.subgroup, odd.group) == ("activities", "award medal", "")


def made_up_sets() -> tuple[list[IconSet], list[Picture]]:
    """Two training artists who draw everything, a third with other things, and the test artist."""
    icon_sets = []
    for artist in ("noto", "twemoji", "fxemoji", demo.TEST_ARTIST):
        is_odd = artist == "fxemoji"
        drawings = [
            Drawing(artist, slug(thing), f"odd {thing}", False, False, "")
            if is_odd
            else Drawing(artist, slug(thing), thing, True, False, "", thing.split()[0], thing)
            for thing in THINGS
        ]
        icon_sets.append(IconSet(artist, f"@icons/{artist}@1.0.0", "MIT", "Somebody", drawings))
    icon_sets[1].drawings.append(Drawing("twemoji", "flag-x", "flag: X", True, True, "", "flags", "flag"))
    icon_sets[1].drawings.append(Drawing("twemoji", "woman", "woman red disc", True, False, ""))
    icon_sets[1].drawings.append(Drawing("twemoji", "man", "man red disc", True, False, ""))
    pictures = []
    for number, drawing in enumerate(drawing for icons in icon_sets for drawing in icons.drawings):
        pixels = np.full((64, 64, 3), number, np.uint8)
        pictures.append(Picture(drawing, cv2.imencode(".png", pixels)[1].tobytes()))
    return icon_sets, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo folder of the made-up sets, with all parts."""
    out_dir = tmp_path_factory.mktemp("demo") / "demo"
    demo.install(out_dir, *made_up_sets(), ["unseen", "roles"])
    return out_dir


def read(shards: Path) -> list[tuple[str, int | None]]:
    """Caption and label of each sample, as the loader reads them."""
    source = TarSource(str(shards))
    samples = [source.read(shard, n) for shard, size in enumerate(source.shard_sizes) for n in range(size)]
    return [((sample.caption or b"").decode(), sample.label) for sample in samples]


def test_the_test_is_a_labelled_set(folder: Path) -> None:
    names = (folder / "test/classnames.txt").read_text().splitlines()
    assert names == sorted(THINGS)
    assert [(names[label], label) for _, label in read(folder / "test") if label is not None] == read(folder / "test")
    assert (folder / "test/zeroshot_classification_templates.txt").read_text() == "{c}\n"


def test_unseen_concepts_are_gone_from_every_artist(folder: Path) -> None:
    unseen = {caption for caption, _ in read(folder / "unseen")}
    assert unseen == {thing for thing in THINGS if demo.is_unseen(slug(thing))}
    left = {caption for caption, _ in read(folder / "train_without_unseen")}
    assert left == {caption for caption, _ in read(folder / "train")} - unseen
    assert [n for n in range(20) if demo.is_unseen(f"thing-{n}")] == [0, 5, 12]


def test_labelled_sets_have_no_flags(folder: Path) -> None:
    for kind, names in (("groups", ["black", "blue", "green", "red"]), ("subgroups", sorted(THINGS))):
        assert (folder / kind / "classnames.txt").read_text().splitlines() == names
        for part, count in (("train", 32), ("test", 16)):
            assert (folder / kind / part / "nshards.txt").read_text() == "1"
            labels = [label for _, label in read(folder / kind / part)]
            assert sorted(labels) == sorted(list(range(len(names))) * (count // len(names)))


def test_roles_are_couples_by_one_artist(folder: Path) -> None:
    assert json.loads((folder / "roles/roles.json").read_text()) == [
        {"role": "red disc", "artist": "twemoji", "woman": 0, "man": 1}
    ]
    assert [caption for caption, _ in read(folder / "roles")] == ["woman red disc", "man red disc"]


def test_two_runs_write_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    demo.install(tmp_path / "again", *made_up_sets(), ["unseen", "roles"])
    files = [path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert len(files) > 30
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes(), file


def test_other_files_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"made_by": demo.MADE_BY, "parts": []}))
    for name, words in (("notes.txt", "holds notes.txt"), ("report.json", "holds something that is not the demo")):
        (tmp_path / name).write_text('{"mine": 1}')
        with pytest.raises(SystemExit):
            demo.main([str(tmp_path), "--with_roles"])
        assert words in capsys.readouterr().err
        assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_npm_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code X' >&2\necho 'npm error it failed, reason: no net' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match=r"could not download thing@1: it failed, reason: no net;"):
        download({"thing@1": ""}, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"npm.* is not on PATH; install Node\.js, or run: pip install"):
        download({"thing@1": ""}, tmp_path)
