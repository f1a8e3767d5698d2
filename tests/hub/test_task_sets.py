"""The test sets of tasks from a Hub of the test's own: whole or named as not, whatever is cut or missing."""

import importlib.util
import io
import json
import shutil
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import processes
import pytest
from filelock import FileLock
from hub.loopback_hub import LoopbackHub
from PIL import Image

from flipscale.cli import main
from flipscale.data.sources.tar import TarSource, add_member
from flipscale.evaluation.suite import build_tasks
from flipscale.evaluation.task_page import check_prepared, read_page, read_prepared
from flipscale.preparation.task_sets import spelled_as

MNIST, FLICKR = "clip-benchmark/wds_mnist", "clip-benchmark/wds_flickr30k"
pytestmark = pytest.mark.usefixtures("logged_in")


def picture(number: int, form: str = "PNG", side: int = 32) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def shard(first: int, count: int, kind: str = "cls", side: int = 32) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number in range(first, first + count):
            said = str(number % 10) if kind == "cls" else f"picture {number}"
            for name, content in (("png", picture(number, side=side)), (kind, said.encode())):
                add_member(tar, f"s{number:07d}.{name}", content)
    return stream.getvalue()


def digits(shards: int = 3, count: int = 4, side: int = 32) -> dict[str, bytes]:
    """The files of MNIST in CLIP_benchmark's layout, as far as a test needs them, and some that no one wants."""
    return {
        "README.md": b"# digits",
        "classnames.txt": "".join(f"{name}\n" for name in range(10)).encode(),
        "zeroshot_classification_templates.txt": b"a picture of {c}\n",
        "train/0.tar": shard(0, 2),
        "test/nshards.txt": f"{shards}\n".encode(),
        **{f"test/{number}.tar": shard(number * count, count, side=side) for number in range(shards)},
    }


def prepare(folder: Path, *arguments: str) -> None:
    main(["prepare", "tasks", str(folder), *arguments])


def refusal(capsys: pytest.CaptureFixture, folder: Path, *arguments: str) -> str:
    """What `prepare tasks` says in one line when it fails."""
    with pytest.raises(SystemExit):
        prepare(folder, *arguments)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flipscale: error: ")]
    return line


def content(folder: Path) -> dict[str, bytes]:
    """The files of a prepared set, without hidden folders, and the manifest and indices of its shards."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix in (".tar", ".txt")}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(".")}


def test_a_set_is_prepared_whole_and_only_once(hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    commit, files = hub.add(MNIST, digits()), digits()
    prepare(tmp_path, "--only", "mnist")
    size = sum(len(c) for name, c in files.items() if name.startswith(("test", "class", "zero")))
    assert f"{size / 1000:.3g} kB to download into {tmp_path}" in capsys.readouterr().out
    assert content(tmp_path / "mnist") == {n: c for n, c in files.items() if n not in ("README.md", "train/0.tar")}
    said = read_prepared(tmp_path / "mnist")
    assert said is not None
    assert (said["revision"], said["images"], said["source"]["repo"]) == (commit, 12, MNIST)
    assert said["files"]["test/2.tar"]["bytes"] == len(files["test/2.tar"])
    (task,) = build_tasks(["mnist"], tmp_path)
    made = {path.name for path in (tmp_path / "mnist" / "test").iterdir()}
    task.check()
    assert {path.name for path in (tmp_path / "mnist" / "test").iterdir()} == made, "the index is there already"
    asked = len(hub.requests)
    prepare(tmp_path, "--only", "mnist")
    assert len(hub.requests) == asked
    assert "is prepared" in capsys.readouterr().out


def test_a_half_downloaded_set_is_not_taken_for_whole(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hub.add(MNIST, digits())
    hub.fail_next(20, path=r"GET .*test/1.tar", status=404, message="gone")
    assert "data set clip-benchmark/wds_mnist at http://127" in refusal(capsys, tmp_path, "--only", "mnist")
    assert (tmp_path / "mnist" / "test" / "0.tar").exists()
    with pytest.raises(ValueError, match="the data of task mnist was prepared only in part"):
        check_prepared(tmp_path / "mnist", "mnist")
    hub._faults.clear()
    # A file that was cut by other means has its size and its digest compared.
    damaged = tmp_path / "mnist" / "test" / "0.tar"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (tmp_path / "mnist" / "test" / "7.tar").write_bytes(b"of an older set")
    prepare(tmp_path, "--only", "mnist")
    assert content(tmp_path / "mnist")["test/0.tar"] == digits()["test/0.tar"]
    assert not (tmp_path / "mnist" / "test" / "7.tar").exists()
    check_prepared(tmp_path / "mnist", "mnist")
    damaged.unlink()
    with pytest.raises(ValueError, match=r"run `flipscale prepare tasks .* --only mnist`"):
        check_prepared(tmp_path / "mnist", "mnist")


def test_sources_that_cannot_be_read(hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hub.add(FLICKR, {"test/nshards.txt": b"1\n", "test/0.tar": shard(0, 3, "txt")})
    hub.add("clip-benchmark/wds_stl10", digits(), gated=True)
    hub.add("clip-benchmark/wds_gtsrb", {"README.md": b"empty"})
    hub.add("clip-benchmark/wds_objectnet", {name: c for name, c in digits().items() if name != "classnames.txt"})
    hub.add("clip-benchmark/wds_country211", digits())
    hub.add(MNIST, {**digits(), "test/nshards.txt": b"4\n"})
    names = ("flickr30k", "stl10", "gtsrb", "objectnet", "country211", "mnist", "cars")
    with pytest.raises(SystemExit):
        prepare(tmp_path, "--only", *names)
    said = capsys.readouterr()
    assert "6 of 7 tasks" in said.err
    for words in (
        f"stl10: data set clip-benchmark/wds_stl10 at {hub.endpoint} is gated",
        "gtsrb: data set clip-benchmark/wds_gtsrb has no test/*.tar",
        "objectnet: data set clip-benchmark/wds_objectnet has no classnames.txt",
        "classnames.txt lists 10 classes, 211 are expected",
        "has 3 shards, nshards.txt says 4",
        f"cars: data set clip-benchmark/wds_cars at {hub.endpoint} does not exist",
    ):
        assert words in said.out
    assert [name for name in names if read_prepared(tmp_path / name)] == ["flickr30k"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"test/1.tar": b"junk" * 999}, "1.tar cannot be read (it is not a tar file"),
        ({"test/nshards.txt": b"\xff\xfe3"}, "nshards.txt is no text in UTF-8"),
        ({"classnames.txt": b"caf\xe9\n" * 10}, "classnames.txt is no text in UTF-8"),
        ({f"test/{n}.tar": bytes(1024) for n in range(3)}, "has no images; the source has changed"),
    ],
)
def test_sources_that_are_damaged(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture, files: dict[str, bytes], words: str
) -> None:
    hub.add(MNIST, {**digits(), **files})
    assert words in refusal(capsys, tmp_path, "--only", "mnist")
    assert not read_prepared(tmp_path / "mnist")


def test_what_stops_it_before_a_download(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(MNIST, digits())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(10, 0, 10))
        assert "has 10 B free" in refusal(capsys, tmp_path / "new", "--only", "mnist")
    assert not (tmp_path / "new").exists()
    with FileLock(tmp_path / ".mnist.lock"):
        assert "another process prepares" in refusal(capsys, tmp_path, "--only", "mnist")
    assert not hub.asked("resolve")
    nowhere = f"http://127.0.0.1:{processes.free_port()}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nowhere)
    assert f"data set {MNIST} at {nowhere} cannot be read (" in refusal(capsys, tmp_path, "--only", "mnist")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it" in refusal(capsys, tmp_path, "--only", "mnist")


def test_tables_become_shards(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flipscale.preparation.task_sets.IMAGES_PER_SHARD", 4)
    kinds, classes = [("JPEG", "PNG", "BMP")[n % 3] for n in range(9)], [n % 2 for n in range(9)]
    images = [{"bytes": picture(n, kind), "path": None} for n, kind in enumerate(kinds)]
    table = parquet(tmp_path / "memes.parquet", ["image"], id=list(range(9)), image=images, label=classes)
    files = {"data/validation-00000-of-00001.parquet": table, "data/test-00000-of-00001.parquet": b"another split"}
    add_pinned(hub, "hateful_memes", files)
    prepare(tmp_path / "tasks", "--only", "hateful_memes")
    place = tmp_path / "tasks" / "hateful_memes"
    assert sorted(content(place)) == [
        "classnames.txt", "test/0.tar", "test/1.tar", "test/2.tar", "test/nshards.txt",
        "zeroshot_classification_templates.txt",
    ]  # fmt: skip
    assert (place / "classnames.txt").read_text() == "meme\nhatespeech meme\n"
    assert (place / "zeroshot_classification_templates.txt").read_text() == "a {c}.\n"
    assert (place / "test" / "nshards.txt").read_text() == "3\n"
    assert {path.name for path in place.iterdir() if path.name.startswith(".")} == set()
    _, labels, pictures = zip(*samples_of(place), strict=True)
    assert list(labels) == classes
    # The bytes are the source's, unless no shard holds such a format.
    assert [pictures[n] == picture(n, kinds[n]) for n in range(3)] == [True, True, False]
    assert (np.array(Image.open(io.BytesIO(pictures[2]))) == np.array(Image.open(io.BytesIO(picture(2))))).all()


def test_middle_frames_of_clips(hub: LoopbackHub, tmp_path: Path) -> None:
    import datasets

    page = read_page("ucf101")
    clips = [("a", "1", frame) for frame in (2, 0, 1)] + [("a", "2", 0)] + [("b", "1", frame) for frame in range(4)]
    names = [name.replace(" ", "") for name in page.class_names]
    columns = {
        "image": [{"bytes": picture(n), "path": None} for n in range(8)],
        "video_id": [clip[0] for clip in clips], "clip_id": [clip[1] for clip in clips],
        "frame": [clip[2] for clip in clips], "label": [3, 3, 3, 4, 5, 5, 5, 5],
    }  # fmt: skip
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows = rows.cast_column("label", datasets.ClassLabel(names=names))
    files = {}
    for number, part in enumerate((rows.select(range(5)), rows.select(range(5, 8)))):
        part.to_parquet(tmp_path / "part.parquet")
        files[f"data/test-0000{number}-of-00002.parquet"] = (tmp_path / "part.parquet").read_bytes()
    add_pinned(hub, "ucf101", files)
    prepare(tmp_path / "tasks", "--only", "ucf101")
    samples = samples_of(tmp_path / "tasks/ucf101")
    assert [(image, label) for _, label, image in samples] == [(picture(2), 3), (picture(3), 4), (picture(6), 5)]
    written = (tmp_path / "tasks" / "ucf101" / "classnames.txt").read_text().splitlines()
    assert written == list(page.class_names) != names


def parquet(path: Path, of_images: list[str], **columns: list) -> bytes:
    """A parquet file of columns, of which some hold images."""
    import datasets

    rows = datasets.Dataset.from_dict(columns)
    for name in of_images:
        rows = rows.cast_column(name, datasets.Image())
    rows.to_parquet(path)
    return path.read_bytes()


def add_pinned(hub: LoopbackHub, task: str, files: dict[str, bytes]) -> None:
    source = read_page(task).source
    hub.add(source.repo, files)
    hub.repos[source.repo].branches[source.revision] = hub.repos[source.repo].branches["main"]


def samples_of(place: Path) -> list[tuple[list[str], int | None, bytes]]:
    """Captions, class and image of each sample."""
    source = TarSource(str(place / "test"))
    found = [source.read(shard, number) for shard, size in enumerate(source.shard_sizes) for number in range(size)]
    return [(b"".join(sample.captions).decode().splitlines(), sample.label, sample.image) for sample in found]


def stored(numbers: list[int], side: int = 32) -> list[dict]:
    return [{"bytes": picture(number, "JPEG", side), "path": None} for number in numbers]


def test_subsets_in_repositories_of_their_own(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SugarCrepe: each subset is a repository, whose captions are lists. All repositories have one commit, or none."""
    monkeypatch.setattr("flipscale.preparation.task_sets.IMAGES_PER_SHARD", 4)
    subsets = sorted(read_page("sugar_crepe").source.subsets)
    assert len(subsets) == 7
    for number, name in enumerate(subsets):
        captions = [[f"{name} {row}", f"no {name}\n{row}"] for row in range(2)]
        images = stored([2 * number, 2 * number + 1])
        table = parquet(tmp_path / "rows.parquet", ["image"], image=images, tested_labels=captions, true_label=[0, 1])
        if name != "swap_att":
            hub.add(f"HuggingFaceM4/SugarCrepe_{name}", {"data/test-00000-of-00001-ab12.parquet": table})
    arguments = (tmp_path / "tasks", "--only", "sugar_crepe")
    assert "data set HuggingFaceM4/SugarCrepe_swap_att at" in refusal(capsys, *arguments)
    captions = [[f"swap_att {row}", f"no swap_att\n{row}"] for row in range(2)]
    table = parquet(tmp_path / "rows.parquet", ["image"], image=stored([10, 11]), tested_labels=captions)
    hub.add("HuggingFaceM4/SugarCrepe_swap_att", {"data/test-00000-of-00001-cd34.parquet": table})
    hub.fail_next(20, path=r"GET .*swap_obj.*parquet", status=404, message="gone")
    refusal(capsys, *arguments)
    place = tmp_path / "tasks/sugar_crepe"
    assert len(list((place / ".parquet").rglob("*.parquet"))) == 6
    hub._faults.clear()
    asked = len(hub.asked("parquet"))
    prepare(*arguments)
    assert len(hub.asked("parquet")) - asked <= 2, "whole files are not downloaded again"
    assert (place / "classnames.txt").read_text().splitlines() == subsets
    expected = [([f"{subsets[n // 2]} {n % 2}", f"no {subsets[n // 2]} {n % 2}"], n // 2) for n in range(14)]
    found = samples_of(place)
    assert [sample[:2] for sample in found] == expected
    assert [image for _, _, image in found] == [picture(number, "JPEG") for number in range(14)]
    assert (place / "test/nshards.txt").read_text() == "4\n"
    revision = read_prepared(place)["revision"]  # type: ignore[index]
    assert revision.split(",")[0] == hub.repos["HuggingFaceM4/SugarCrepe_add_att"].branches["main"]
    assert len(revision.split(",")) == 7
    (task,) = build_tasks(["sugar_crepe"], tmp_path / "tasks")
    task.check()


def test_boxes_and_subsets_of_tables(hub: LoopbackHub, tmp_path: Path) -> None:
    """ARO's VG sets: the part in the box; symmetric relations, and attributes of few images, are no subsets."""
    relations = ["to the left of", "near", "riding", "riding"]
    boxes = [{"x": 2.0, "y": 3.0, "w": 20.0, "h": 10.0}] * 4
    texts = {"true_caption": list("abcd"), "false_caption": list("wxyz")}
    table = parquet(tmp_path / "a", ["image"], image=stored([1, 2, 3, 3]), relation_name=relations, bbox=boxes, **texts)
    add_pinned(hub, "aro_vg_relation", {"data/test-00000-of-00001.parquet": table})
    attributes = [["white", "old"]] * 25 + [["old", "white"]] * 24
    many = {"image": stored([1] * 49), "bbox": boxes[:1] * 49, "true_caption": ["a"] * 49, "false_caption": ["b"] * 49}
    table = parquet(tmp_path / "b", ["image"], attributes=attributes, **many)
    add_pinned(hub, "aro_vg_attribution", {"data/test-00000-of-00001.parquet": table})
    prepare(tmp_path / "tasks", "--only", "aro_vg_relation", "aro_vg_attribution")
    place = tmp_path / "tasks/aro_vg_relation"
    found = samples_of(place)
    assert [sample[:2] for sample in found] == [(["a", "w"], 1), (["b", "x"], None), (["c", "y"], 0), (["d", "z"], 0)]
    assert (place / "classnames.txt").read_text() == "riding\nto the left of\n"
    whole = Image.open(io.BytesIO(picture(1, "JPEG")))
    assert (np.array(Image.open(io.BytesIO(found[0][2]))) == np.array(whole.crop((2, 3, 22, 13)))).all()
    assert (tmp_path / "tasks/aro_vg_attribution/classnames.txt").read_text() == "white_old\n"
    labels = [label for _, label, _ in samples_of(tmp_path / "tasks/aro_vg_attribution")]
    assert labels == [0] * 25 + [None] * 24


def test_pairs_orders_and_long_captions(hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    two = {"image_0": stored([0, 2]), "image_1": stored([1, 3]), "caption_0": ["a", "c"], "caption_1": ["b", "d"]}
    table = {"data/test-00000-of-00001.parquet": parquet(tmp_path / "a", ["image_0", "image_1"], **two)}
    hub.add("facebook/winoground", table, gated=True)
    line = refusal(capsys, tmp_path / "tasks", "--only", "winoground")
    assert "is gated; accept its terms on its page, then log in with `hf auth login`" in line
    hub.repos["facebook/winoground"].gated = False
    words = {name: [f"{name} {row}" for row in range(3)] for name in read_page("aro_coco_order").source.texts}
    table = {"data/test-00000-of-00001.parquet": parquet(tmp_path / "b", ["images"], images=stored([0, 0, 1]), **words)}
    add_pinned(hub, "aro_coco_order", table)
    add_pinned(hub, "aro_flickr30k_order", table)
    words = {"description": ["Two lines.\nIn one.", "A long one."], "example_id": ["x", "y"]}
    table = parquet(tmp_path / "c", ["image"], image=stored([4, 5]), **words)
    add_pinned(hub, "docci", {"data/test-00000-of-00001.parquet": table, "data/train-00000-of-00001.parquet": b"no"})
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        for name in ("__MACOSX/Urban1k/image/._1.jpg", "Urban1k/image/7.jpg"):
            zipped.writestr(name, b"no picture, and no text")
        for number in (10, 2, 1):
            zipped.writestr(f"Urban1k/caption/{number}.txt", f"Street {number}.\nSecond line")
            zipped.writestr(f"Urban1k/image/{number}.jpg", picture(number, "JPEG"))
    hub.add("BeichenZhang/Urban1k", {"README.md": b"streets", "Urban1k.zip": archive.getvalue()})
    names = ("winoground", "aro_coco_order", "aro_flickr30k_order", "docci", "urban1k")
    prepare(tmp_path / "tasks", "--only", *names)
    for name in names:
        (task,) = build_tasks([name], tmp_path / "tasks")
        task.check()
        assert not (tmp_path / "tasks" / name / "classnames.txt").exists()
        assert not list((tmp_path / "tasks" / name).glob(".*"))
    pairs = [(["a", "b"], 0), (["b", "a"], 1), (["c", "d"], 2), (["d", "c"], 3)]
    found = {name: samples_of(tmp_path / "tasks" / name) for name in names}
    assert found["winoground"] == [(captions, None, picture(number, "JPEG")) for captions, number in pairs]
    orders = [[f"{name} {row}" for name in read_page("aro_coco_order").source.texts] for row in range(3)]
    assert [captions for captions, _, _ in found["aro_coco_order"]] == orders
    assert [captions for captions, _, _ in found["docci"]] == [["Two lines. In one."], ["A long one."]]
    assert found["urban1k"] == [([f"Street {number}."], None, picture(number, "JPEG")) for number in (1, 2, 10)]
    hub.add("BeichenZhang/Urban1k", {"Urban1k.zip": archive.getvalue()[:200]})
    assert "urban1k: its files cannot be read (" in refusal(capsys, tmp_path / "new", "--only", "urban1k")
    words["description"][1] = " "
    table = parquet(tmp_path / "c", ["image"], image=stored([4, 5]), **words)
    add_pinned(hub, "docci", {"data/test-00000-of-00001.parquet": table})
    assert "docci: row 1 has no caption; the source" in refusal(capsys, tmp_path / "new", "--only", "docci")


def imagenet(numbers: list[int], classes: list[int]) -> bytes:
    """A shard of ImageNet's validation images, called by their numbers."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number, label in zip(numbers, classes, strict=True):
            for kind, content in (("cls", str(label).encode()), ("jpg", picture(number, "JPEG")), ("json", b"{}")):
                add_member(tar, f"ILSVRC2012_val_{number:08d}.{kind}", content)
    return stream.getvalue()


def test_real_labels_go_by_file_name(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of images 1 to 5, timm's list has none, {970, 795}, {230, 231}, {809}, {516, 850}.
    shards = {"imagenet1k-validation-01.tar": imagenet([2], [970]), "imagenet1k-train-0000.tar": b"not asked for"}
    hub.add("timm/imagenet-1k-wds", {**shards, "imagenet1k-validation-00.tar": imagenet([5, 1, 3], [850, 65, 230])})
    prepare(tmp_path, "--only", "imagenet_real")
    place = tmp_path / "imagenet_real"
    assert sorted(content(place))[1:4] == ["test/0.tar", "test/1.tar", "test/nshards.txt"]
    assert json.loads((place / "real_labels.json").read_text()) == [[516, 850], [], [230, 231], [970, 795]]
    (task,) = build_tasks(["imagenet_real"], tmp_path)
    task.check()
    # Labels in another order are noticed, and a timm that is not there.
    hub.add("timm/imagenet-1k-wds", {"imagenet1k-validation-00.tar": imagenet([5, 2, 3], [1, 2, 3])})
    assert "0 of 3 images have their class among their labels" in refusal(capsys, tmp_path / "a", "--only", task.name)
    hub.add("timm/imagenet-1k-wds", {"imagenet1k-validation-00.tar": shard(0, 2)})
    assert "has an image s0000000, not ILSVRC2012_val_..." in refusal(capsys, tmp_path / "b", "--only", task.name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "come in the package timm; `pip install timm`" in refusal(capsys, tmp_path / "c", "--only", task.name)


def test_class_names_are_spelled_as_clip_s() -> None:
    assert spelled_as(["maple_tree", "Bee", "aquarium_fish"], ["aquarium fish", "bee", "maple tree"]) == [
        "maple tree", "bee", "aquarium fish",
    ]  # fmt: skip
    for names, known in ((["a", "b"], ["a", "c"]), (["a_b", "ab"], ["ab", "a b"]), (["a", "b"], ["A"]), (["a"], [])):
        assert spelled_as(names, known) == names
