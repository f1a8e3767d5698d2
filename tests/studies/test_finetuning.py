"""`flipscale init --start`: the start's recipe, the held-out pairs, the trials, and what was lost."""

import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import open_clip
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import COLOURS, SHAPES, add_member, changed_recipe, draw, metrics
from foreign_towers import SMALL_TIMM, save_text, save_timm
from hub.native import export_native

from flipscale.cli import main
from flipscale.cli.init import Init
from flipscale.data.decode import decode_whole
from flipscale.data.sources.opening import open_shards, open_source
from flipscale.evaluation.suite import build_tasks
from flipscale.io.errors import UserError
from flipscale.model.configuration_flip import FlipConfig
from flipscale.objectives.captioning import CaptioningFlipModel
from flipscale.planning.proposal import Survey
from flipscale.pretrain import pretrain
from flipscale.recipe.data import DataRecipe, SourceRecipe
from flipscale.recipe.recipe import Recipe
from flipscale.recipe.schedule import schedule_stages
from flipscale.start.complete_recipe import parse_recipe
from flipscale.studies.finetuning import (
    Candidate,
    HeldOut,
    Start,
    Trial,
    TrialSearch,
    _propose,
    find_guards,
    find_replay,
    half_of_batches,
    hold_out,
    open_start,
)

NAMES = [f"{article} {colour} {shape}" for article in ("a", "the", "a the") for colour in COLOURS for shape in SHAPES]
SOURCE = SourceRecipe(shards="pairs")


def write_pairs(folder: Path, count: int, names: list[str], shift: int = 0) -> None:
    """Write pairs with captions that name the picture, or with `shift` another one of the names."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(count):
            caption, drawn = names[(number + shift) % len(names)], names[number % len(names)]
            picture = cv2.cvtColor(draw(*drawn.split()[-2:], rng), cv2.COLOR_RGB2BGR)
            add_member(tar, f"{number:04d}.png", cv2.imencode(".png", picture)[1].tobytes())
            add_member(tar, f"{number:04d}.txt", caption.encode())


def survey_of(pairs: int, captions: int) -> Survey:
    counts = {f"the left {number}": pairs // captions for number in range(captions)}
    return Survey(pairs=pairs, width=64, height=64, tokens=5, captions=counts, sampled=pairs)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def run(recipe: dict, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the made-up pictures that is right for most, and evaluated them."""
    run_dir = tmp_path_factory.mktemp("start") / "run"
    file = run_dir.with_suffix(".yaml")
    stages = [{"name": "whole", "samples": 1600, "base_lr": 0.03, "warmup_samples": 160}]
    tasks = {"num_workers": 0, "tasks": [{"kind": "zero_shot", "data": str(shards), "every_samples": 800}]}
    changes = {"stages": stages, "eval": tasks, "output_dir": str(run_dir)}
    file.write_text(yaml.safe_dump(changed_recipe(recipe, changes)))
    return pretrain(parse_recipe(["--config", str(file)]))


@pytest.fixture
def new_process() -> Iterator[None]:
    """A process chooses its precision once: `init --start` chooses the faster one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def proposed(start: Start, part: str, mask_ratio: float = 0.0, samples: int = 64, **values: Any) -> tuple[Recipe, str]:
    """Return the recipe of a part of a start on 400 pairs of 40 captions, and its text."""
    given = {"tasks": [], "output_dir": "runs/mine", "num_workers": 0, **values}
    proposal, _, _ = _propose(start, SOURCE, survey_of(400, 40), **given)
    candidate = Candidate(part, 1e-3, mask_ratio=mask_ratio)
    proposal.values |= {**candidate.values(proposal.batch_size), "samples": samples}
    return proposal.recipe(), proposal.written(["A line."])


def test_the_held_out_captions_are_in_no_trial(here: Path) -> None:
    write_pairs(here / "pairs", 96, NAMES[:48])
    source = open_source(DataRecipe(sources=[SOURCE]))
    for name in ("one", "again", "other", "pictures"):
        (here / name).mkdir()
    one, again = (hold_out(source, SOURCE, True, here / name) for name in ("one", "again"))
    other = hold_out(source, SOURCE, True, here / "other", seed=1)
    assert one.captions == again.captions != other.captions
    assert 19 <= len(one.captions) <= 20  # a fifth of 96, with both pictures of a caption
    weighted = open_source(DataRecipe(sources=[replace(SOURCE, weights=str(one.weights))]))
    drawn = weighted.drawn(0)
    assert drawn is not None
    assert len(drawn) + len(one.captions) == 96
    assert not {weighted.read_captions(0, int(number))[0].decode() for number in drawn} & set(one.captions)
    # Captions that old pairs have are not held out.
    write_pairs(here / "old", 8, NAMES[:8])
    (here / "beside").mkdir()
    beside = hold_out(source, SOURCE, True, here / "beside", old=[replace(SOURCE, shards="old")])
    assert not {*beside.captions} & {*NAMES[:8]}
    assert 16 <= len(beside.captions) <= 17  # a fifth of 80
    # Where captions name a few classes, all of them stay.
    pictures = hold_out(source, SOURCE, False, here / "pictures")
    assert len(pictures.captions) == 19
    assert len({*pictures.captions}) > 10


def captioned(folder: Path, rows: list[tuple[int, list[str]]]) -> HeldOut:
    """Write pairs of these pictures and captions in two shards, and hold some out."""
    encoded = {}
    for number in {row[0] for row in rows}:
        picture = np.full((32, 32, 3), (number % 250, number // 250, 77), np.uint8)
        encoded[number] = cv2.imencode(".jpg", picture)[1].tobytes() + number.to_bytes(4, "big")
    (folder / "pairs").mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"pairs/{shard}.tar", "w") as tar:
            for place, (number, texts) in enumerate(rows[shard::2]):
                add_member(tar, f"{shard}{place:04d}.jpg", encoded[number])
                add_member(tar, f"{shard}{place:04d}.json", json.dumps({"captions": texts}).encode())
    named = SourceRecipe(shards=str(folder / "pairs"))
    (folder / "folder").mkdir()
    return hold_out(open_source(DataRecipe(sources=[named])), named, True, folder / "folder")


@pytest.mark.parametrize(
    ("kind", "whole"),
    [("five rows", True), ("five captions", True), ("shared captions", True), ("one caption of all", False)],
)
def test_a_picture_is_on_one_side(kind: str, whole: bool, here: Path) -> None:
    """Also with several captions, in rows of their own or in one, some of them of other pictures."""
    rows = [(picture, [f"{picture} {number}"]) for number in range(5) for picture in range(80)]
    if kind == "five captions":
        rows = [(picture, [f"{picture} {number}" for number in range(5)]) for picture in range(80)]
    elif kind != "five rows":
        rows += [(picture, ["a" if kind == "one caption of all" else f"a {picture // 2}"]) for picture in range(80)]
    held_out = captioned(here, rows)
    source = open_source(DataRecipe(sources=[SourceRecipe(shards="pairs", weights=str(held_out.weights))]))
    sides: dict[str, set[bytes]] = {"image": set(), "text": set()}
    for shard in range(2):
        drawn = source.drawn(shard)
        assert drawn is not None
        for number in drawn:
            sample = source.read(shard, int(number))
            sides["image"].add(sample.image)
            sides["text"].update(sample.captions)
    count = len(held_out.captions)
    pictures = {held_out.source.read(0, row).image for row in range(count)}
    assert len(pictures) == count
    assert 12 <= count <= 18  # a fifth
    assert len(sides["image"]) == 80 - count
    assert not pictures & sides["image"]
    assert getattr(held_out, "by_caption", True) == whole
    assert not whole or not {text.encode() for text in held_out.captions} & sides["text"]


def test_old_pictures_and_captions(here: Path) -> None:
    """Pictures that old pairs have are never held out. Where old pairs have all captions, new pictures are."""
    write_pairs(here / "pairs", 96, NAMES)
    source, old = open_source(DataRecipe(sources=[SOURCE])), replace(SOURCE, shards="old")
    with tarfile.open("pairs/0.tar") as tar:
        images = [tar.extractfile(member).read() for member in tar if member.name.endswith("png")]  # type: ignore
    (here / "old").mkdir()
    with tarfile.open("old/0.tar", "w") as tar:
        for number in range(96):
            add_member(tar, f"{number}.png", images[number % 48])
            add_member(tar, f"{number}.txt", NAMES[number % len(NAMES)].encode())
    (here / "folder").mkdir()
    held_out = hold_out(source, SOURCE, True, here / "folder", old=[old])
    assert not held_out.by_caption
    assert 8 <= len(held_out.captions) <= 9  # a fifth of 48
    assert not {held_out.source.read(0, row).image for row in range(len(held_out.captions))} & {*images[:48]}
    (here / "none").mkdir()
    with pytest.raises(UserError, match=r"0 of 96 pairs can be held out .* --replay"):
        hold_out(source, SOURCE, True, here / "none", old=[SOURCE])


def test_a_gain_is_corrected_for_choosing(here: Path) -> None:
    """The best of 19 models that are no better is rarely clear, a true gain is, and so few equal changes are not."""
    rng, count = np.random.default_rng(0), 96
    held_out = HeldOut(None, [f"a {number // 2}" for number in range(count)], here)
    clear = 0
    for _ in range(200):
        old, *models = np.repeat(rng.choice([0.0, 33.0, 67.0, 100.0], (20, count // 2)), 2, axis=1)
        clear += held_out.gain(max(models, key=np.mean), old).low > 0
    assert clear <= 12
    assert held_out.gain(np.clip(old + rng.choice([0, 67], count), 0, 100), old).low > 0
    few = replace(held_out, captions=["a", "b", "c"])
    assert few.gain(np.full(3, 50.0), np.zeros(3)).low < 0


class Fixed:
    """An embedder that gives every picture the same order of captions, or the right caption of all."""

    def __init__(self, count: int, ids: list[int] | None = None) -> None:
        self.count, self.ids = count, ids

    def images(self, source: Any) -> torch.Tensor:
        order = -torch.arange(self.count).float()
        if self.ids is None:
            return order.expand(len(source), -1)
        return torch.nn.functional.one_hot(torch.tensor(self.ids), self.count) + 0.01 * order

    def texts(self, texts: list[str]) -> torch.Tensor:
        return torch.eye(len(texts))


def test_frequent_captions_are_no_gain() -> None:
    """A model that only learnt which captions are frequent is at chance, where pictures are held out alone."""
    ids = [number for number, count in enumerate((60, 20, 9, 4, 3, 2, 1, 1)) for _ in range(count)]
    held_out = HeldOut(range(len(ids)), [f"a {number}" for number in ids], Path(), by_caption=False)  # type: ignore
    chance, frequent, right = (held_out.scores(one) for one in (None, Fixed(8), Fixed(8, ids)))  # type: ignore
    np.testing.assert_allclose([frequent.mean(), right.mean()], [chance.mean(), 100.0], rtol=1e-12)
    assert held_out.gain(frequent, chance).low < 0 < held_out.gain(right, chance).low


@pytest.mark.parametrize(
    ("gain", "first"), [(0.7, "No gain was shown: +0.7 points ("), (-1.0, "better"), (30.0, "Gained +30.0 points (")]
)
def test_a_recipe_only_for_a_clear_gain(
    gain: float,
    first: str,
    run: Path,
    here: Path,
    new_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_pairs(here / "pairs", 400, NAMES[:40])

    def scores(search: TrialSearch, name: str) -> tuple[np.ndarray, list]:
        count = len(search.held_out.captions)
        old = np.random.default_rng(0).choice([0.0, 33.0, 67.0], count)
        change = np.random.default_rng(1).normal(0.0, 15.0, count)
        return old + (change - change.mean() + gain) * (name != str(run)), []

    def trials(search: TrialSearch, minutes: float, *_: int) -> list[Trial]:
        return [Trial(Candidate("all", 1e-3), minutes, here / "trial", 640, search.measured(search.open("trial"))[0])]

    monkeypatch.setattr(TrialSearch, "open", lambda search, name: name)
    monkeypatch.setattr(TrialSearch, "measured", scores)
    monkeypatch.setattr(TrialSearch, "run", trials)
    main(["init", "mine.yaml", "--start", str(run), "--shards", "pairs"])
    report = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert first in report[0]
    assert ("No recipe is proposed." in report[0]) == (gain < 30)
    assert Path("mine.yaml").exists() == (gain == 30)
    assert any(line.startswith("next: ") for line in report) == (gain == 30)


@pytest.mark.parametrize("event", ["taken", "SIGTERM"])
def test_trials_are_not_lost(
    event: str, run: Path, here: Path, new_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A name that is taken during the trials gives another one, and a signal leaves no lock."""
    write_pairs(here / "pairs", 48, NAMES)

    def report(*arguments: Any, **values: Any) -> tuple[list[str], str, float]:
        if event == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        Path("mine.yaml").write_text("another's")
        return ["Gained."], Path("right.yaml").read_text(), 0.5

    start = open_start([str(run)], here / "converted")
    Path("right.yaml").write_text(proposed(start, "all")[1])
    monkeypatch.setattr("flipscale.studies.finetuning.propose_finetuning", report)
    words = ["init", "mine.yaml", "--start", str(run), "--shards", "pairs"]
    if event == "SIGTERM":
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    else:
        main(words)
        assert Path("mine.yaml").read_text() == "another's"
        assert Path("mine_2.yaml").read_text() == Path("right.yaml").read_text()
        said = capsys.readouterr().out
        assert "finetune --config mine_2.yaml\n" in said
        assert "then: flipscale export runs/mine --interpolate" in said
    assert not list(here.glob(".*"))


def test_damaged_pictures_are_not_held_out(here: Path) -> None:
    write_pairs(here / "whole", 48, NAMES)
    (here / "pairs").mkdir()
    with tarfile.open("whole/0.tar") as whole, tarfile.open("pairs/0.tar", "w") as tar:
        for number, member in enumerate(whole):
            content = whole.extractfile(member).read()  # type: ignore[union-attr]
            add_member(tar, member.name, content[: len(content) // 2] if number % 4 == 0 else content)
    (here / "folder").mkdir()
    held_out = hold_out(open_source(DataRecipe(sources=[SOURCE])), SOURCE, True, here / "folder")
    assert 0 < len(held_out.captions) < 9
    assert all(decode_whole(held_out.source.read(0, row).image).any() for row in range(len(held_out.captions)))


def test_too_few_pairs_to_hold_out(here: Path) -> None:
    write_pairs(here / "pairs", 40, NAMES[:1])
    (here / "folder").mkdir()
    with pytest.raises(ValueError, match="8 of 40 pairs can be held out to choose by, with 1 captions"):
        hold_out(open_source(DataRecipe(sources=[SOURCE])), SOURCE, False, here / "folder")


def towers(folder: Path) -> list[str]:
    save_timm("vit_tiny_patch16_224", folder / "vit", **SMALL_TIMM)
    save_text("bert", folder / "bert")
    return [str(folder / "vit"), str(folder / "bert")]


def checkpoint_of_open_clip(folder: Path) -> list[str]:
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    file = folder / "small_clip.json"
    file.write_text(json.dumps({"embed_dim": 48, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(file)
    torch.save(open_clip.create_model("small_clip", load_weights=False).state_dict(), folder / "small.pt")
    return [f"open_clip:{file},{folder / 'small.pt'}"]


STARTS: dict[str, Callable[[Path], list[str]]] = {
    "a folder of a CLIPModel": lambda folder: [str(export_native("clip", folder / "clip"))],
    "a folder of a SiglipModel": lambda folder: [str(export_native("siglip", folder / "siglip"))],
    "a folder of two towers": lambda folder: [str(export_native("towers", folder / "both"))],
    "a checkpoint of open_clip": checkpoint_of_open_clip,
    "a timm ViT and a BERT": towers,
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] * ("open_clip" in kind)) for kind in STARTS]
)
def test_a_recipe_of_each_start_trains(kind: str, here: Path) -> None:
    write_pairs(here / "pairs", 48, NAMES)
    start = open_start(STARTS[kind](here), here / "converted")
    recipe, text = proposed(start, "all, early blocks less")
    assert pretrain(replace(recipe, log=replace(recipe.log, report_to=[]))) == Path("runs/mine")
    assert metrics(here / "runs/mine")[-1]["samples_seen"] == 64
    assert text.startswith("# Written by `flipscale init --start`.")
    assert "# A line.\n" in text
    assert not recipe.data.mirror  # captions name left
    loss = ("sigmoid", "equal_captions") if "Siglip" in kind else ("infonce", "pairs")
    assert (recipe.loss.kind, recipe.loss.positives) == loss


def test_a_recipe_of_a_run(run: Path, here: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = open_start([str(run)], here / "converted")
    recipe, text = proposed(start, "text tower, projections")
    assert (recipe.model.family, recipe.model.frozen) == ("flip", ["vision_model"])
    assert (recipe.model.vision_config["hidden_size"], recipe.model.text_config["vocab_size"]) == (32, 16)
    assert recipe.data.tokenizer == str(run / "model")
    assert recipe.data.global_batch_size == 16  # half of 40 captions, as a power of two
    assert (recipe.stages[0].base_lr, recipe.stages[0].warmup_samples) == (0.016, 6)
    assert "frozen: [vision_model] # trained: text tower, projections" in text
    lora, _ = proposed(start, "LoRA of rank 8")
    assert (lora.optim.lora.rank, lora.model.frozen) == (8, [])
    for steps, stages in ((1, [1]), (2, [1, 1]), (3, [2, 1]), (10, [8, 2])):
        masked, _ = proposed(start, "all", mask_ratio=0.5, samples=16 * steps)
        assert [one.last - one.first for one in schedule_stages(masked.stages, 16, None)] == stages
    guards, where = find_guards(str(run))
    assert guards == [{"kind": "zero_shot", "data": str(shards), "every_samples": 0}]  # once, not along the run
    assert where == f"of {run}/recipe.yaml"
    shutil.copytree(run / "model", here / "short/model")
    (here / "sets/cars").mkdir(parents=True)
    own = {"eval": {"tasks": ["gone", "cars", "pets"], "tasks_dir": "sets", "retrieval": str(shards)}}
    (here / "short/recipe.yaml").write_text(yaml.safe_dump(own))
    cars, own_pairs = find_guards("short")[0]
    assert (cars["kind"], cars["data"], cars["every_samples"]) == ("zero_shot", "sets/cars", 0)
    assert own_pairs == {"kind": "retrieval", "data": str(shards), "every_samples": 0}
    printed = capsys.readouterr().out
    assert "short/recipe.yaml: no guard: no task is called 'gone'" in printed
    assert "decoder" not in printed
    config = FlipConfig.from_pretrained("short/model").with_parts({"bos_token_id": 1, "eos_token_id": 2}, {})
    CaptioningFlipModel(config).save_pretrained("short/model")
    open_start(["short"], here / "converted")
    assert "short: its decoder is left out" in capsys.readouterr().out


def test_old_pairs_are_half_of_each_batch(
    run: Path, here: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pairs of the start's own run, or named ones, in proportion to their sizes."""
    old = SourceRecipe(shards=str(shards), weight=0.5)
    assert find_replay(str(run)) == [old]
    race = here / "race"
    shutil.copytree(run, race / "mask")
    shutil.copytree(run / "model", race / "model")
    assert find_replay(str(race)) == [old]
    assert find_guards(str(race))[1] == f"of {race}/mask/recipe.yaml"
    saved = race / "mask/recipe.yaml"
    saved.write_text(saved.read_text().replace(str(shards), "elsewhere"))
    assert find_replay(str(race)) == []
    assert f"elsewhere: old pairs of {saved}, not on this machine" in capsys.readouterr().out
    saved.write_text(saved.read_text().replace("elsewhere", f"{shards}/*.tar"))
    assert find_replay(str(race)) == [replace(old, shards=f"{shards}/*.tar")]
    assert find_replay(str(export_native("clip", here / "clip"))) == []
    write_pairs(here / "pairs", 48, NAMES)
    own, third = SourceRecipe(shards=str(shards)), SourceRecipe(shards="pairs")
    weights = [one.weight or 0.0 for one in half_of_batches([own, third])]
    assert weights == pytest.approx([0.5 * 96 / 144, 0.5 * 48 / 144], rel=0.01)
    start = replace(open_start([str(run)], here / "converted"), replay=[old])
    recipe, text = proposed(start, "all")
    assert [(one.shards, one.weight) for one in recipe.data.sources] == [("pairs", 0.5), (str(shards), 0.5)]
    assert f"- {{shards: {shards}, weight: 0.5}} # old pairs, so that less is forgotten" in text
    # Only the new pairs are held out.
    (here / "folder").mkdir()
    held_out = hold_out(open_source(DataRecipe(sources=[SOURCE])), SOURCE, True, here / "folder")
    trained: list[Recipe] = []

    def train(given: Recipe) -> Path:
        trained.append(given)
        raise UserError("enough")

    proposal, _, _ = _propose(start, SOURCE, survey_of(400, 40), tasks=[], output_dir="x", num_workers=0)
    with pytest.raises(UserError, match="enough"):
        TrialSearch(train, proposal, start, SOURCE, held_out, [], here).run(1.0, 32, 4)
    new = replace(SOURCE, weights=str(held_out.weights), weight=0.5)
    assert [one.data.sources for one in trained] == [[new, old]] * len(trained)


@pytest.mark.long
def test_the_new_pairs_are_no_old_pairs(
    run: Path,
    here: Path,
    shards: Path,
    new_process: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trial that replayed them would see the held-out ones."""
    trained: list[Recipe] = []

    def train(given: Recipe) -> Path:
        trained.append(given)
        raise UserError("enough")

    monkeypatch.setattr("flipscale.pretrain.pretrain", train)
    with pytest.raises(UserError, match="enough"):
        Init(Path("mine.yaml"), shards=f"{shards}/*.tar", start=[str(run)], minutes=1.0).run()
    assert {len(one.data.sources) for one in trained} == {1}
    assert f"{shards}/*.tar: these are old pairs too" in capsys.readouterr().out


def test_two_towers_have_no_old_pairs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert find_replay("") == []


def test_a_rung_that_fails_leaves_the_trials_before(run: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(here / "pairs", 16, NAMES)
    start = open_start([str(run)], here / "converted")
    proposal, _, _ = _propose(start, SOURCE, survey_of(400, 40), tasks=[], output_dir="x", num_workers=0)

    def trial(search: TrialSearch, candidate: Candidate, minutes: float, run_dir: Path) -> Trial:
        if minutes == 1.0:  # the last rung's only trial
            raise FloatingPointError("losses are NaN")
        run_dir.mkdir()
        return Trial(candidate, minutes, run_dir, 64, np.array([candidate.rate]))

    monkeypatch.setattr(TrialSearch, "_trial", trial)
    search = TrialSearch(pretrain, proposal, start, SOURCE, HeldOut(open_shards("pairs"), [], here), [], here)
    (left,) = search.run(1.0, 32, 4)
    assert (left.run_dir.parent, left.run_dir.name[:7]) == (here, "trial1-")
    assert left.run_dir.exists()


@pytest.mark.long
def test_a_loss_is_mixed_away(run: Path, here: Path, shards: Path) -> None:
    """Each picture gets the name of another, which the model learns in place of the right one."""
    write_pairs(here / "pairs", 96, NAMES[:16], shift=1)
    start, tasks = open_start([str(run)], here / "converted"), [{"kind": "zero_shot", "data": str(shards)}]
    recipe, _ = proposed(start, "all")
    stage = replace(recipe.stages[0], samples=1600, base_lr=0.03)
    run_dir = pretrain(replace(recipe, stages=[stage], log=replace(recipe.log, report_to=[])))
    captions = [NAMES[(number + 1) % 16] for number in range(96)]
    held_out = HeldOut(open_shards("pairs"), captions, here)
    proposal, _, _ = _propose(start, SOURCE, survey_of(400, 40), tasks=[], output_dir="x", num_workers=0)
    search = TrialSearch(pretrain, proposal, start, SOURCE, held_out, build_tasks(tasks), here)
    old, before = search.measured(search.open(str(run)))
    trial = Trial(Candidate("all", 1e-3), 1.0, run_dir, 1600, old)
    chosen, made = search.mixed(trial, before, old)
    assert [one.alpha for one in made] == [1.0, 0.75, 0.5, 0.25]
    assert made[0].value > old.mean()
    loss, *_ = made[0].lost(before)  # top-1, and top-5 perhaps
    assert (loss.task, loss.metric) == ("zero_shot", "top1")
    assert loss.high is not None
    assert loss.high < 0
    kept = [one for one in made if not one.lost(before) and held_out.gain(one.scores, old).low > 0]
    assert chosen == max(kept, key=lambda one: one.value, default=made[0])
    # A start that it does not lose against needs no mixture.
    assert len(search.mixed(trial, made[0].guards, old)[1]) == 1


@pytest.mark.long
def test_four_hundred_pairs_and_a_minute(
    run: Path, here: Path, shards: Path, new_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(here / "pairs", 400, NAMES[:40])
    main(["init", "mine.yaml", "--start", str(run), "--shards", "pairs", "--tests", str(shards), "--minutes", "0.05"])
    *_, table = capsys.readouterr().out.partition("search: 9 seconds for a training of 3 seconds\n")
    lines = table.splitlines()
    assert lines[0] == "rung 1, 0.3 seconds a trial, 10 of them:"
    first = lines[lines.index("") + 1]
    assert first.startswith(("Gained ", "LOST zero_shot", f"{run} is better", "No gain was shown"))
    assert "zero_shot, top-1" in lines[lines.index("") + 2]
    assert f"Guards are those of {run}/recipe.yaml." in lines
    assert not list(here.glob("tmp*"))
    if "No recipe" in first:
        assert not Path("mine.yaml").exists()
        return
    assert f"# {first[:60]}" in Path("mine.yaml").read_text()
    recipe = parse_recipe(["--config", "mine.yaml"])
    assert [task.get("name", task["kind"]) for task in recipe.eval.tasks] == [
        "new_zero_shot",
        "new_retrieval",
        "zero_shot",
    ]
    AcceleratorState._reset_state(reset_partial_state=True)
    main(["finetune", "--config", "mine.yaml", "--log.report_to", "[]"])
    assert metrics(here / "runs/mine")[-1]["samples_seen"] > 0


@pytest.mark.long
def test_a_model_that_is_better_as_it_is(
    recipe: dict, here: Path, new_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four plain colours, which a run knows without a mistake."""
    (here / "pairs").mkdir()
    with tarfile.open(here / "pairs/0.tar", "w") as tar:
        for number in range(96):
            colour = list(COLOURS)[number % 4]
            picture = np.full((32, 32, 3), COLOURS[colour][::-1], np.uint8)
            picture[0, 0] = number  # no copy of another
            add_member(tar, f"{number:04d}.png", cv2.imencode(".png", picture)[1].tobytes())
            add_member(tar, f"{number:04d}.txt", f"a {colour}".encode())
    data = {"shards": "pairs"}
    Path("start.yaml").write_text(yaml.safe_dump(changed_recipe({**recipe, "output_dir": "start"}, {"data": data})))
    pretrain(parse_recipe(["--config", "start.yaml"]))
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    main(["init", "mine.yaml", "--start", "start", "--shards", "pairs", "--minutes", "0.02"])
    said = capsys.readouterr().out
    assert "before: mean recall 100.0 %" in said
    assert "start is better on the held-out pairs as it is. No recipe is proposed.\n" in said
    assert "no trial" in said
    assert "rung 1" not in said
    assert not Path("mine.yaml").exists()


@pytest.mark.long
def test_a_converted_start_is_left_only_beside_its_recipe(here: Path, refused: Callable[..., str]) -> None:
    """A failed search removes it, the next one replaces what a killed one left, and another folder stays."""
    write_pairs(here / "pairs", 48, NAMES)
    (name,), folder = checkpoint_of_open_clip(here), here / "models/mine_start"
    words = ["init", "mine.yaml", "--shards", "pairs", "--tests", "nowhere", "--start"]
    for _ in range(2):
        assert "nowhere" in refused(*words, name)
        assert not folder.exists()
    open_start([name], folder)
    assert "nowhere" in refused(*words, name)
    assert "nowhere" in refused(*words, "models/mine_start")
    assert (folder / "config.json").is_file(), "the user's own"
    (folder / "README.md").write_text("another model")
    assert "models/mine_start exists" in refused(*words, name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start", "./nowhere"], "there is no folder './nowhere'"),
        (["--start", "a", "b", "c"], "start is a b c; name one model, or an image tower and a text tower"),
        (["--start", "https://hub.example/a/b"], "'https://hub.example/a/b' is a URL; name a model on the Hub"),
        (["--start", "open_clip:ViT-B-32"], "open_clip:ViT-B-32 names no weights"),
        (["--start", "a", "--tokenizer", "bert"], "tokenizer is 'bert' and start is a"),
        (["--start", "a", "--gpu", "h100", "--hours", "3"], "gpu is 'h100' and start is a"),
        (["--guards", "old"], "guards is old, "),
        (["--replay", "old"], "replay is old, "),
        (["--start", "a", "b", "--replay", "nowhere"], "nowhere"),
    ],
)
def test_refusals(words: list[str], message: str, here: Path, shards: Path, refused: Callable[..., str]) -> None:
    assert message in refused("init", "mine.yaml", "--shards", shards, *words)
    assert not Path("mine.yaml").exists()
