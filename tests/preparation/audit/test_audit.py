"""What `prepare audit` finds in training data that was made with faults, copies and test images on purpose."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.conftest import encoded, write_tar
from lingua import Language, LanguageDetectorBuilder
from PIL import Image
from sklearn.datasets import load_sample_images

from flipscale.cli import main
from flipscale.data.sources.tar import TarSource
from flipscale.preparation.audit import audit as audit_module
from flipscale.preparation.audit import words

CAPTIONS = (
    "a woman who is a nurse in a white coat, seen from the side",
    "the man is a firefighter and she is a firefighter too",
    "ein Mann mit einem roten Hut steht vor einem alten Haus",
    "people at a market in Papua New Guinea, in Turkey and in France",
    "a turkey on a plate",
    "two pilots and a girl",
)


def photos(side: int = 128, least_contrast: float = 40) -> list[Image.Image]:
    """Squares cut from the two photographs that scikit-learn has, none overlapping another and none mostly sky."""
    squares = [
        photo[top : top + side, left : left + side]
        for photo in load_sample_images().images
        for top in range(0, photo.shape[0] - side + 1, side)
        for left in range(0, photo.shape[1] - side + 1, side)
    ]
    return [Image.fromarray(square) for square in squares if square.std() > least_contrast]


def copy(image: Image.Image, scale: float = 1.0, kind: str = "JPEG", quality: int = 90) -> bytes:
    size = tuple(round(side * scale) for side in image.size)
    return encoded(image.resize(size, Image.Resampling.BICUBIC), kind, quality=quality)


def write_pairs(path: Path, pairs: list[tuple[bytes, str | None]]) -> None:
    images = {f"{number}.jpg": image for number, (image, _) in enumerate(pairs)}
    captions = {f"{number}.txt": text.encode() for number, (_, text) in enumerate(pairs) if text is not None}
    write_tar(path, images | captions)


@pytest.fixture(scope="module", autouse=True)
def two_languages() -> Iterator[None]:
    """A detector of English and German only, because the models of all languages take seconds."""
    some = LanguageDetectorBuilder.from_languages(Language.ENGLISH, Language.GERMAN).build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "_detector", lambda: some)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training shards `train`, and below `tests` a flat set and one in CLIP_benchmark's layout."""
    folder, cut = tmp_path_factory.mktemp("audit"), photos()
    plain = [(copy(image), CAPTIONS[number % 6]) for number, image in enumerate(cut[:8])]
    blank = [(copy(Image.new("RGB", (90, 90), colour)), "an empty page") for colour in ("white", "#fdfdfd")]
    write_pairs(folder / "train" / "0.tar", [*plain, (b"no picture", "a broken file"), (copy(cut[8]), None)])
    copies = [plain[0], (copy(cut[1], 0.6, "WEBP", 60), "again"), (copy(cut[2], 1.4, quality=50), "again")]
    write_pairs(folder / "train" / "1.tar", [*copies, *blank])
    write_pairs(folder / "tests" / "flat" / "0.tar", [(copy(cut[9]), "a"), plain[3], (copy(cut[4], 0.8), "b")])
    write_pairs(folder / "tests" / "laid_out" / "test" / "0.tar", [(copy(cut[10]), "a")])
    return folder


@pytest.fixture(scope="module")
def audited(folder: Path, tokenizer_dir: Path) -> dict[str, Any]:
    command = ["prepare", "audit", str(folder / "train"), "--tests", str(folder / "tests"), "--num_workers", "1"]
    main([*command, "--output_dir", str(folder / "audit"), "--tokenizer", str(tokenizer_dir)])
    return json.loads((folder / "audit" / "audit.json").read_text())


def test_figures(audited: dict[str, Any]) -> None:
    assert (audited["samples"], audited["captions"]["captions"], audited["captions"]["distinct"]) == (15, 14, 9)
    assert audited["captions"]["commonest"][0] == {"caption": CAPTIONS[0], "count": 3, "share": pytest.approx(3 / 14)}
    lengths = audited["captions"]["lengths"]
    assert (lengths["characters"]["max"], lengths["words"]["min"]) == (max(map(len, CAPTIONS)), 1)
    assert lengths["tokens"]["max"] > 5
    long = {row["language"]: row["count"] for row in audited["languages"]["long"]["languages"]}
    assert (long, audited["languages"]["is_sample"]) == ({"English": 6, "German": 1}, False)
    counts = {cause: entry["count"] for cause, entry in audited["unusable"].items()}
    assert counts == {"undecodable_image": 1, "missing_caption": 1}
    assert audited["unusable"]["undecodable_image"]["examples"][0].split(": ")[0].endswith("0.tar#8")
    gender = audited["gender"]
    assert (gender["women"], gender["men"], gender["both"]) == (4, 0, 2)  # "Mann" is no English word
    found = {row["occupation"]: (row["captions"], row["with_women"]) for row in gender["occupations"]}
    assert found == {"nurse": (3, 3), "firefighter": (2, 0), "pilot": (1, 1)}
    countries = {row["code"]: row["captions"] for row in audited["countries"]["rows"]}
    assert countries == {"PG": 1, "TR": 1, "FR": 1}
    images = audited["images"]
    assert (images["decoded"], images["exact_copies"], images["near_copies"], images["nearly_blank"]) == (14, 1, 2, 2)


def test_overlap_and_page(audited: dict[str, Any], folder: Path) -> None:
    assert [tuple(one.values()) for one in audited["tests"]] == [("flat", 3, 1, 1), ("laid_out", 1, 0, 0)]
    flat, laid_out = (json.loads((folder / f"audit/overlap/{name}.json").read_text()) for name in ("flat", "laid_out"))
    found = [(one["shard"], one["number"], one["kind"], Path(one["training"]).name) for one in flat["overlap"]]
    assert found == [("0.tar", 1, "exact", "0.tar#3"), ("0.tar", 2, "near", "0.tar#4")]
    assert flat["contents"] == TarSource(str(folder / "tests" / "flat")).contents_digest()
    assert laid_out["overlap"] == []
    page = (folder / "audit" / "audit.md").read_text()
    for picture in ("near_duplicates.png", "overlap.png"):
        assert f"]({picture})" in page
        assert np.ptp(np.asarray(Image.open(folder / "audit" / picture))) > 100
    assert "| images of flat that are in the data, of 3 | 2 |" in page


@pytest.mark.long
def test_a_sample_of_captions(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The captions whose language is looked at are drawn by their rows, and their shares have intervals."""
    monkeypatch.setattr(audit_module, "MOST_LANGUAGES", 7)
    (tmp_path / "overlap").mkdir()
    for earlier in ("overlap/other.json", "overlap.png"):  # of other data
        (tmp_path / earlier).write_text("{}")
    command = ["prepare", "audit", str(folder / "train"), "--output_dir", str(tmp_path)]
    main([*command, "--num_workers", "2"])
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["languages"]["is_sample"]
    assert 0 < found["languages"]["checked"] < 14
    assert not any((tmp_path / earlier).exists() for earlier in ("overlap/other.json", "overlap.png"))
    row = found["languages"]["long"]["languages"][0]
    assert 0 <= row["low"] < row["share"] <= row["high"] <= 1


def test_bad_input(folder: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def audit(*words: object) -> str:
        return refused("prepare", "audit", *words, "--output_dir", tmp_path / "out", "--num_workers", 1)

    write_pairs(tmp_path / "bare/0.tar", [(copy(photos()[0]), None)])
    assert "none of the 1 samples" in audit(tmp_path / "bare")
    write_pairs(tmp_path / "empty/0.tar", [])
    assert "there is no sample in 1 shards" in audit(tmp_path / "empty")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lingua" else find_spec(name))
    assert "pip install 'flipscale[audit]'" in audit(folder / "train")
    assert not (tmp_path / "out").exists()
