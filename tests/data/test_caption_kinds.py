"""Captions by kind: fields of KEY.json, the text file and columns, drawn by weight; several captions of an image."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, SHAPES, draw, losses, tiny_recipe
from data.conftest import encoded, write_tar

from flipscale.data.captions import choose_captions
from flipscale.data.pairs import InputShape, check_kinds
from flipscale.data.samples import BadSample, MissingCaption
from flipscale.data.sources.opening import open_source
from flipscale.data.tokenizers import load_tokenizer
from flipscale.objectives.contrastive import Contrastive
from flipscale.pretrain import pretrain
from flipscale.recipe.data import DataRecipe, SourceRecipe
from flipscale.start.complete_recipe import parse_recipe

KINDS = {"alt": 0.3, "synthetic": 0.7}


def picture() -> bytes:
    return encoded(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8), "JPEG")


def write(folder: Path, samples: list[dict[str, bytes]]) -> str:
    """Write a shard of samples, each by the extension of its files, in their order."""
    named = {f"{number:05d}.{kind}": files[kind] for number, files in enumerate(samples) for kind in files}
    write_tar(folder / "0.tar", named)
    return str(folder)


def fields(**values: object) -> bytes:
    return json.dumps({"caption": "grey cross", **values}).encode()


FILES = {"jpg": picture(), "json": fields(alt="red disc", synthetic=["blue bar", "blue ring"]), "txt": b"a grey cross"}
ORDERS = [*itertools.permutations(["jpg", "json", "txt"]), ("json", "cls", "txt", "jpg")]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_kinds_are_found_wherever_the_json_file_is(tmp_path: Path, order: tuple[str, ...]) -> None:
    """An index has a place for the text file or the JSON file, not for both."""
    files = {**FILES, "cls": b"3"}
    shards = write(tmp_path, 3 * [{name: files[name] for name in order}])
    source = open_source(DataRecipe(shards=shards, captions={**KINDS, "txt": 1, "absent": 1}))
    for number in range(3):
        sample = source.read(0, number)
        expected = {"alt": (b"red disc",), "synthetic": (b"blue bar", b"blue ring"), "txt": (b"a grey cross",)}
        assert sample.kinds == {**expected, "absent": ()}
        assert sample.label == (3 if "cls" in order else None)
    assert open_source(DataRecipe(shards=shards)).read(0, 0).captions == (b"a grey cross",)


def test_samples_may_lack_a_file_or_a_field(tmp_path: Path) -> None:
    samples = [{"jpg": picture(), "txt": b"a"}, {"jpg": picture(), "json": fields(alt="b")}, {**FILES, "json": b"{}"}]
    source = open_source(DataRecipe(shards=write(tmp_path, samples), captions={"alt": 1, "txt": 1}))
    assert [source.read(0, number).captions for number in range(3)] == [(b"a",), (b"b",), (b"a grey cross",)]
    check_kinds(source, ["alt", "txt"])
    with pytest.raises(ValueError, match=r"data.captions or a stage's has the kind 'atl'.*first 3 samples.*alt in 0"):
        check_kinds(open_source(DataRecipe(shards=str(tmp_path), captions={"atl": 1})), ["atl", "alt"])


def test_a_kind_may_be_in_one_source_of_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flipscale.data.pairs._SAMPLES_WITH_KINDS", 2)
    kinds = [{"jpg": picture(), "json": json.dumps({kind: "red disc"}).encode()} for kind in KINDS]
    folders = [write(tmp_path / str(number), 3 * [sample]) for number, sample in enumerate(kinds)]
    recipe = DataRecipe(shards=None, sources=[SourceRecipe(shards=folder) for folder in folders], captions=KINDS)
    check_kinds(open_source(recipe), list(KINDS))
    with pytest.raises(ValueError, match=r"'absent'.*first 4 samples .*alt in 2, synthetic in 2"):
        check_kinds(open_source(recipe), [*KINDS, "absent"])


@pytest.mark.parametrize("damage", [b"x" * 8, b"\x80" + b"\xff" * 7])
def test_a_damaged_header_of_the_json_file_is_a_bad_sample(tmp_path: Path, damage: bytes) -> None:
    shards = write(tmp_path, 2 * [{name: FILES[name] for name in ("jpg", "json", "txt")}])
    open_source(DataRecipe(shards=shards))
    stored = bytearray((tmp_path / "0.tar").read_bytes())
    header = stored.index(b"00000.json\0")
    stored[header + 124 : header + 132] = damage
    (tmp_path / "0.tar").write_bytes(stored)
    index, manifest = tmp_path / "0.tar.index.npy", tmp_path / "shards.manifest"
    assert index.exists()
    assert manifest.exists()
    source = open_source(DataRecipe(shards=shards, captions=KINDS))
    with pytest.raises(BadSample):
        source.read(0, 0)
    assert source.read(0, 1).kinds["alt"] == (b"red disc",)


def test_columns_of_a_dataset_are_kinds(tmp_path: Path) -> None:
    import datasets

    rows = {"image": [picture()], "alt": ["red disc"], "synthetic": [["blue bar", "blue ring"]]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "rows"))
    recipe = DataRecipe(shards=None, sources=[SourceRecipe(dataset=str(tmp_path / "rows"))], captions=KINDS)
    assert open_source(recipe).read(0, 0).kinds == {"alt": (b"red disc",), "synthetic": (b"blue bar", b"blue ring")}


def test_weights_choose_among_the_kinds_of_a_sample() -> None:
    kinds = {"alt": (b"a",), "synthetic": (b"b", b"c"), "other": (b"d",)}
    draws = ((np.arange(1000) + 0.5) / 1000).tolist()
    counts = Counter(choose_captions(kinds, KINDS, [draw])[0] for draw in draws)
    assert counts == {"a": 300, "b": 350, "c": 350}
    lacking = Counter(choose_captions({**kinds, "alt": (b" ",)}, KINDS, [draw])[0] for draw in draws)
    assert lacking == {"b": 500, "c": 500}
    with pytest.raises(MissingCaption):
        choose_captions({"other": (b"d",)}, KINDS, [0.5])


def test_no_caption_is_taken_twice_before_all_are() -> None:
    kinds = {"alt": (b"a",), "synthetic": (b"b", b"c")}
    for draws in np.random.default_rng(0).random((50, 6)).tolist():
        chosen = choose_captions(kinds, KINDS, draws)
        assert sorted(chosen[:3]) == sorted(chosen[3:]) == ["a", "b", "c"]
    first = Counter(choose_captions(kinds, KINDS, draws)[0] for draws in np.random.default_rng(0).random((4000, 2)))
    assert first["a"] == pytest.approx(1200, abs=100)


def test_a_position_has_its_captions_in_any_batch(tmp_path: Path, tokenizer_dir: Path) -> None:
    """They are a function of the seed and the position; the first does not depend on their number."""
    recipe = DataRecipe(shards=write(tmp_path, 40 * [FILES]), captions=KINDS, num_workers=0, global_batch_size=8)
    source, tokenizer = open_source(recipe), load_tokenizer(str(tokenizer_dir), 6)

    def rows(positions: list[int], count: int, **options: float) -> torch.Tensor:
        shape = InputShape(16, 8, 6)
        objective = Contrastive(captions_per_image=count)
        dataset = objective.dataset(source, tokenizer, recipe, shape, 0, 0.0, **options)
        return dataset.__getitems__(positions)["input_ids"].unflatten(0, (len(positions), -1))

    whole = rows(list(range(80)), 2)
    assert torch.equal(whole[5:9], rows([5, 6, 7, 8], 2))
    assert torch.equal(whole[:, :1], rows(list(range(80)), 1))
    assert len({tuple(row.tolist()) for row in whole[:, 0]}) == 3
    assert not torch.equal(whole[:40, 0], whole[40:, 0]), "an epoch draws its own"
    assert (whole[:, 0] != whole[:, 1]).any(dim=1).all()
    masked = rows(list(range(80)), 2, text_mask_ratio=0.5)
    assert masked.shape == (80, 2, 3)


@pytest.fixture
def kinds_recipe(tmp_path: Path, caption_tokenizer: Path, write_recipe: Callable[..., Path]) -> Callable[..., Path]:
    """Write a recipe that trains on captions of two kinds: one says what is seen, the other nothing."""
    rng, samples = np.random.default_rng(0), []
    for colour, shape in itertools.product(COLOURS, SHAPES):
        for _ in range(4):
            json_file = fields(alt="a", synthetic=[f"a {colour} {shape}", f"{shape} {colour}"])
            samples.append({"jpg": encoded(draw(colour, shape, rng), "JPEG"), "json": json_file})
    shards = write(tmp_path / "kinds", samples)
    recipe = tiny_recipe(Path(shards), caption_tokenizer)

    def written(name: str, **changes: object) -> Path:
        data = {**recipe["data"], "captions": {"synthetic": 1.0}}
        return write_recipe(tmp_path / name, **{"data": data, **changes})

    return written


@pytest.mark.long
def test_a_stage_has_its_own_kinds(kinds_recipe: Callable[..., Path]) -> None:
    """Where every caption is the same, no image is told from another by its caption."""
    run_dir = pretrain(parse_recipe(["--config", str(kinds_recipe("run"))]))
    blind = ["--stages.unmasked.captions", "{alt: 1}"]
    other = pretrain(parse_recipe(["--config", str(kinds_recipe("stages")), *blind]))
    assert losses(other)[:24] == losses(run_dir)[:24]
    assert all(loss > np.log(16) - 0.01 for loss in losses(other)[24:])
    assert losses(run_dir)[-1] < 2.5


@pytest.mark.parametrize("kind", ["infonce", pytest.param("sigmoid", marks=pytest.mark.long)])
def test_two_captions_of_an_image_are_learned(kinds_recipe: Callable[..., Path], kind: str) -> None:
    flags = ["--loss.kind", kind, "--loss.captions_per_image", "2"]
    run_dir = pretrain(parse_recipe(["--config", str(kinds_recipe("two")), *flags]))
    micro = ["--data.micro_batch_size", "4"]
    again = pretrain(parse_recipe(["--config", str(kinds_recipe("micro")), *flags, *micro]))
    assert losses(again) == pytest.approx(losses(run_dir), abs=1e-5)
    assert losses(run_dir)[-1] < losses(run_dir)[0] - 0.1
