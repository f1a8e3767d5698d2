"""Attacks by recipes, options and surroundings: what is asked before anything is trained or measured."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from attacks import ground
from attacks.attack import Attack, Ended, hold
from conftest import add_member

Make = Callable[[Path], list[str]]
STAGE = {"name": "masked", "samples": 96, "mask_ratio": 0.75, "base_lr": 0.012}
BOMB = "a0: &a0 [1, 2]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


def _recipe(**changes: Any) -> Make:
    """A run with these changes, none of which may be found out after it has trained."""

    def make(folder: Path) -> list[str]:
        ground.shards(folder)
        return ground.pretrain(folder, **changes)

    return make


def _stages(**changes: Any) -> Make:
    return _recipe(stages=[{**STAGE, **changes}])


def _text(text: str | bytes) -> Make:
    """A recipe of this text."""

    def make(folder: Path) -> list[str]:
        content = text if isinstance(text, bytes) else text.encode()
        (folder / "odd.yaml").write_bytes(content)
        return ["pretrain", "--config", "odd.yaml"]

    return make


def _flags(*flags: str) -> Make:
    """The good recipe and these flags."""

    def make(folder: Path) -> list[str]:
        ground.shards(folder)
        return [*ground.pretrain(folder), *flags]

    return make


def _command(*words: str) -> Make:
    return lambda folder: list(words)


def _test_set(kind: str, odd: dict[str, bytes]) -> Make:
    """A run that is to be evaluated at its end on a set of which one sample is odd."""

    def make(folder: Path) -> list[str]:
        data = ground.shards(folder)
        with tarfile.open(data / "00000.tar") as tar:
            member = next(one for one in tar if one.name.endswith(".jpg"))
            image = tar.extractfile(member).read()  # type: ignore[union-attr]
        (folder / "test").mkdir()
        for text in data.glob("*.txt"):
            (folder / "test" / text.name).write_bytes(text.read_bytes())
        with tarfile.open(folder / "test/00000.tar", "w") as tar:
            for number in range(20):
                fields = {"jpg": image, "txt": b"a red bar", "cls": b"1", **(odd if number == 13 else {})}
                for ending, content in fields.items():
                    add_member(tar, f"{number:03}.{ending}", content)
        return ground.pretrain(folder, eval={"tasks": [{"kind": kind, "data": "test"}]})

    return make


def _nothing_trained(folder: Path, ended: Ended) -> None:
    assert not (folder / "run").exists(), list((folder / "run").iterdir())


def _nothing_run(folder: Path, ended: Ended) -> None:
    assert not (folder / "pwned").exists()


def _file_for_folder(folder: Path) -> list[str]:
    ground.shards(folder)
    (folder / "file").write_text("x")
    return ground.pretrain(folder, output_dir="file/run")


def _file_and(*words: str) -> Make:
    """A command, with a file named `file`."""

    def make(folder: Path) -> list[str]:
        (folder / "file").write_text("x")
        return list(words)

    return make


def _folder_for_recipe(folder: Path) -> list[str]:
    (folder / "odd").mkdir()
    return ["pretrain", "--config", "odd"]


def _code_in_a_section(folder: Path) -> list[str]:
    (folder / "evil.py").write_text("open('pwned', 'w')\nclass Data: pass\n")
    (folder / "odd.yaml").write_text("data: evil.Data\n")
    return ["pretrain", "--config", "odd.yaml"]


def _code_in_a_flag(folder: Path) -> list[str]:
    (folder / "evil.py").write_text("open('pwned', 'w')\nclass Data: pass\n")
    return ["pretrain", "--config", "small_cpu", "--data", "evil.Data"]


def _saved_before(folder: Path) -> list[str]:
    """A finished run's own `recipe.yaml`, without the fields that versions before this one did not have."""
    run = ground.run_of(folder)
    saved = yaml.safe_load((run / "recipe.yaml").read_text())
    del saved["loss"], saved["save"]["every_minutes"], saved["log"]["profile_steps"], saved["hub"]
    file = folder / "old.yaml"
    file.write_text(yaml.safe_dump({**saved, "output_dir": str(run), "data": {**saved["data"], "shards": "data"}}))
    return ["pretrain", "--config", str(file)]


def _refused(name: str, make: Make, *says: str, **more: Any) -> Attack:
    return Attack(name, make, 2, says, more.pop("check", _nothing_trained), **more)


def _init(*flags: str, change: Callable[[Path], object] = lambda folder: None, shards: str = "data") -> Make:
    """A proposal for GPUs elsewhere, after `change`; flags that come twice count as they come last."""

    def make(folder: Path) -> list[str]:
        ground.shards(folder)
        change(folder)
        elsewhere = ["--gpu", "h100", "--num_gpus", "1", "--hours", "1"]
        return ["init", "mine.yaml", "--shards", shards, "--tokenizer", str(ground.tokenizer()), *elsewhere, *flags]

    return make


def _init_to(name: str, change: Callable[[Path], object] = lambda folder: None) -> Make:
    def make(folder: Path) -> list[str]:
        command = _init(change=change)(folder)
        return [command[0], name, *command[2:]]

    return make


def _shards_of(fields: dict[str, bytes], count: int = 20) -> Callable[[Path], None]:
    """One more shard, alone in the folder `odd`."""

    def change(folder: Path) -> None:
        (folder / "odd").mkdir()
        with tarfile.open(folder / "odd/0.tar", "w") as tar:
            for number in range(count):
                for ending, content in fields.items():
                    add_member(tar, f"{number:03}.{ending}", content)

    return change


def _odd_beside_good(folder: Path) -> None:
    with tarfile.open(folder / "data/00004.tar", "w") as tar:
        for number, (image, text) in enumerate(
            [(b"", b"a"), (b"\xff\xd8", b"a"), (b"%!PS", b"a"), (b"x" * 999, b"\xff\0"), (b"GIF89a", b"a" * 10**6)]
        ):
            add_member(tar, f"{number}.jpg", image)
            add_member(tar, f"{number}.txt", text)


_ODD_NAME = "da: {ta # 'x'} - \u202e!!python"


def _named_so(folder: Path, ended: Ended) -> None:
    assert yaml.safe_load((folder / "mine.yaml").read_text())["data"]["shards"] == _ODD_NAME


def _none_proposed(folder: Path, ended: Ended) -> None:
    assert not (folder / "mine.yaml").exists()


def _stays(folder: Path, ended: Ended) -> None:
    assert (folder / "mine.yaml").read_text() == "mine"


def _odd_tokenizer(folder: Path) -> None:
    (folder / "tok").mkdir()
    (folder / "tok/tokenizer.json").write_bytes(b"\x80\x04cposix\nsystem\n")


def _page(folder: Path) -> None:
    folder.mkdir()
    (folder / "0.tar").write_text("<html>404</html>" * 999)


ATTACKS = [
    # Numbers of a recipe.
    _refused("eval.batch_size -1", _recipe(eval={"batch_size": -1}), "eval.batch_size is -1; it must be at least 1"),
    _refused("a negative rate", _stages(base_lr=-0.1), "stages[0].base_lr is -0.1; it must be at least 0"),
    _refused("a rate that is NaN", _stages(base_lr=float("nan")), "stages[0].base_lr is nan; it must be at least 0"),
    _refused(
        "max_grad_norm -1", _recipe(optim={"max_grad_norm": -1}), "optim.max_grad_norm is -1.0; it must be above 0"
    ),
    _refused(
        "a crop of five to nine times the image",
        _recipe(data={"crop_scale": [5, 9]}),
        "data.crop_scale[0] is 5.0; it must be above 0 and at most 1",
    ),
    _refused(
        "a crop's range the wrong way round",
        _recipe(data={"crop_scale": [0.9, 0.5]}),
        "data.crop_scale is [0.9, 0.5]; the least share of the image comes first",
    ),
    _refused("seed 10^30", _recipe(seed=10**30), "seed is 1000000000000000000000000000000; it must be at least 0"),
    _refused("a seed of 500 digits", _text("seed: " + "9" * 500), "has a number of 500 digits"),
    _refused(
        "batch size 0", _recipe(data={"global_batch_size": 0}), "data.global_batch_size is 0; it must be at least"
    ),
    _refused(
        "a batch of 10^12 pairs",
        _recipe(data={"global_batch_size": 10**12}),
        "data.global_batch_size is 1000000000000; it must be at least 1 and at most 16,777,216",
    ),
    _refused("a step that may take for ever", _recipe(log={"hang_seconds": float("inf")}), "log.hang_seconds is inf"),
    _refused("save.total_limit -1", _recipe(save={"total_limit": -1}), "save.total_limit is -1; it must be at least 1"),
    _refused(
        "adam_beta2 1", _recipe(optim={"adam_beta2": 1.0}), "optim.adam_beta2 is 1.0; it must be at least 0 and b"
    ),
    _refused("workers -1", _recipe(data={"num_workers": -1}), "data.num_workers is -1; it must be at least 0"),
    _refused(
        "mask_ratio 1.0", _stages(mask_ratio=1.0), "stages[0].mask_ratio is 1.0; it must be at least 0 and below 1"
    ),
    _refused(
        "a word for a number",
        _recipe(optim={"weight_decay": "some"}),
        "Got value: some",
    ),
    _refused(
        "yes for a number",
        _text("data: {num_workers: yes}\n"),
        "Got value: True",
    ),
    _refused("a number of no value", _text("data: {num_workers: }\n"), "data.num_workers is null; leave it out"),
    _refused(
        "R@0",
        _recipe(eval={"tasks": [{"kind": "retrieval", "data": "data", "ks": [0]}]}),
        "eval.tasks[0].ks[0] is 0; it must be at least 1",
    ),
    _refused(
        "an evaluation every -5 samples",
        _recipe(eval={"tasks": [{"kind": "retrieval", "data": "data", "every_samples": -5}]}),
        "eval.tasks[0].every_samples is -5; it must be at least 0",
    ),
    # The model of a recipe.
    _refused(
        "heads that do not divide the width",
        _flags("--model.vision_config.num_attention_heads", "5"),
        "hidden_size 32 is not divisible by num_attention_heads 5",
    ),
    _refused("patch size 0", _flags("--model.vision_config.patch_size", "0"), "patch_size is 0; it must be at least 1"),
    _refused("dropout -1", _flags("--model.text_config.attention_dropout", "-1"), "attention_dropout is -1"),
    _refused(
        "no positions", _flags("--model.text_config.max_position_embeddings", "0"), "max_position_embeddings is 0"
    ),
    _refused("a width of 10^9", _flags("--model.text_config.hidden_size", "1000000000"), "hidden_size is 1000000000"),
    _refused(
        "attention code of somebody's",
        _flags("--model.vision_config._attn_implementation", "someone/kernel"),
        "model.vision_config._attn_implementation is not a field of FlipVisionConfig",
    ),
    # Stages.
    _refused("no stages", _recipe(stages=[]), "stages[0].base_lr is missing"),
    _refused("no samples", _stages(samples=0), "stages[0].samples is 0; it must be at least 1"),
    _refused("fewer samples than a batch", _stages(samples=7), "7 samples are less than one step of 16 pairs"),
    _refused("a warm-up longer than the stage", _stages(warmup_samples=900), "a warm-up of 900 samples is not shorter"),
    _refused("two stages of one name", _recipe(stages=[STAGE, STAGE]), "2 stages are named 'masked'"),
    _refused(
        "an unknown field of a stage", _stages(mask_rato=0.5), "stages[0].mask_rato is no field of a recipe; did you"
    ),
    # YAML.
    _refused("a bomb of aliases", _text(BOMB), "has more than 100,000 values, its aliases written out"),
    _refused("an alias of itself", _text("model: &x {size: *x}\n"), "uses *x, which is not defined before it"),
    _refused("lists nested 900 deep", _text("a: " + "[" * 900 + "]" * 900), "is nested deeper than 32 levels"),
    _refused(
        "a tag that runs a command",
        _text("seed: !!python/object/apply:os.system ['touch pwned']\n"),
        "has the tag tag:yaml.org,2002:python/object/apply:os.system",
        check=_nothing_run,
    ),
    _refused("a class to import for a section", _code_in_a_section, "data is 'evil.Data'", check=_nothing_run),
    _refused(
        "a class to import in a flag", _code_in_a_flag, "--data is 'evil.Data'; set its fields", check=_nothing_run
    ),
    _refused("an octal number", _text("seed: 010\n"), "has 010, which is another number to YAML"),
    _refused("a key twice", _text("seed: 1\nseed: 2\n"), "gives seed twice; leave one of them out (line 2)"),
    _refused("tabs", _text("data:\n\tnum_workers: 1\n"), "cannot be read as YAML"),
    _refused("Latin-1", _text(b"output_dir: caf\xe9\n"), "is not in UTF-8"),
    _refused("an empty file", _text(""), "the recipe is empty; it must have fields"),
    _refused("a list at the top", _text("- seed: 1\n"), "it must have fields, such as name: value"),
    _refused(
        "100 MB", _text(b"#" * 100_000_000), "has 100,000,000 bytes; at most 262,144 of YAML are read", megabytes=400
    ),
    _refused("a folder for a recipe", _folder_for_recipe, "odd is a folder; name a YAML file"),
    _refused(
        "an unknown key", _text("optim: {weigth_decay: 1}\n"), "optim.weigth_decay is no field of a recipe; did you"
    ),
    # What is needed at the end.
    _refused("a tracker that is not installed", _recipe(log={"report_to": ["aim"]}), "which is not installed"),
    _refused("a file in place of the run's folder", _file_for_folder, "output_dir is 'file/run'; "),
    _refused("a NUL in a path", _recipe(output_dir="a\0b"), "output_dir is 'a\\x00b'; it must be without"),
    _refused("~ in a path", _recipe(output_dir="~/run"), "output_dir is '~/run'; name a folder, and in place of ~"),
    _refused("a name of 300 letters", _recipe(output_dir="a" * 300), "use names of at most 255 bytes"),
    _refused("one damaged test image", _test_set("retrieval", {"jpg": b"\xff\xd8\xff cut"}), "cannot be decoded"),
    _refused("one test image without a caption", _test_set("retrieval", {"txt": b"\n"}), "00000.tar#13 has no caption"),
    _refused(
        "one class number too high", _test_set("zero_shot", {"cls": b"99"}), "00000.tar#13 has class 99; 16 names"
    ),
    # Other verbs' options.
    _refused(
        "evaluate --batch_size 0", _command("evaluate", "x", "--batch_size", "0"), "--batch_size is 0; it must be at"
    ),
    _refused(
        "evaluate --num_workers -1", _command("evaluate", "x", "--num_workers", "-1"), "--num_workers is -1; it must"
    ),
    _refused(
        "evaluate --mask_ratio nan", _command("evaluate", "x", "--mask_ratio", "nan"), "--mask_ratio is nan; it must"
    ),
    _refused(
        "probe --l2 inf", _command("probe", "x", "--train", "a", "--test", "b", "--l2", "inf"), "--l2 is inf; it must"
    ),
    _refused(
        "study --minutes nan",
        _command("study", "race", "small_cpu", "--minutes", "nan", "--output_dir", "o"),
        "--minutes is nan",
    ),
    _refused("export --step -4", _command("export", "run", "--step", "-4"), "--step is -4; it must be at least 0"),
    _refused(
        "bench step --batch_size 10^12",
        _command("bench", "step", "--batch_size", str(10**12)),
        "--batch_size is 1000000000000; it must be at l",
    ),
    _refused("RANK=x", _flags(), "the environment has RANK='x'; it must be a whole number", environment={"RANK": "x"}),
    _refused(
        "a flag that nearly is one",
        _flags("--optim.weigth_decay", "1"),
        "--optim.weigth_decay 1; did you mean --optim.weight_decay?",
    ),
    _refused(
        "study --output_dir FILE",
        _file_and("study", "race", "small_cpu", "--minutes", "1", "--output_dir", "file"),
        "--output_dir is 'file'; ",
        "is a file: name another folder",
    ),
    _refused("launch_files FILE", _file_and("launch_files", "file"), "DIR is 'file'; "),
    Attack("a recipe that an older version saved", _saved_before),
    Attack(
        "a proposal over one's own recipe",
        _init_to("mine.yaml", lambda f: (f / "mine.yaml").write_text("mine")),
        2,
        ("mine.yaml is there already",),
        _stays,
    ),
    Attack(
        "a proposal to a link to nothing",
        _init_to("mine.yaml", lambda f: (f / "mine.yaml").symlink_to("no")),
        2,
        ("mine.yaml is there already",),
    ),
    Attack(
        "a proposal to a pipe",
        _init_to("mine.yaml", lambda f: os.mkfifo(f / "mine.yaml")),
        2,
        ("mine.yaml is there already",),
    ),
    Attack(
        "a proposal in a file",
        _init_to("file/mine.yaml", lambda f: (f / "file").touch()),
        2,
        ("file is a file: name another folder",),
    ),
    Attack("a proposal of a name that is no text", _init_to("\udcff.yaml"), 2, ("recipe has letters in its name",)),
    Attack("a proposal of a name of 300 letters", _init_to("x" * 300 + ".yaml"), 2, ("at most 255 bytes",)),
    Attack("a proposal for no shards", _init(shards="*.tar"), 2, ("no shards at '*.tar'",), _none_proposed),
    Attack(
        "a proposal for shards that are pages",
        _init(shards="odd", change=lambda f: _page(f / "odd")),
        2,
        ("odd has 0 pairs; 16 are the least",),
        _none_proposed,
    ),
    Attack(
        "a proposal for pictures without captions",
        _init(shards="odd", change=_shards_of({"jpg": b"x"})),
        2,
        ("none of 20 samples that were looked at has a picture and a caption",),
        _none_proposed,
    ),
    Attack("a proposal for odd pairs beside good ones", _init(change=_odd_beside_good), 0, ("data: 101 pairs",)),
    Attack(
        "a proposal for shards whose name is YAML",
        _init(shards=_ODD_NAME, change=lambda f: (f / "data").rename(f / _ODD_NAME)),
        0,
        ("96 pairs",),
        _named_so,
    ),
    Attack(
        "a proposal for shards whose name is no text",
        _init(shards="\udcff", change=lambda f: (f / "data").rename(f / "\udcff")),
        2,
        ("shards has letters in its name that no recipe can have",),
        _none_proposed,
    ),
    Attack(
        "a proposal with a tokenizer of code",
        _init("--tokenizer", "tok", change=_odd_tokenizer),
        2,
        ("`flipscale prepare tokenizer data DIR` makes one",),
        _none_proposed,
    ),
    Attack(
        "a proposal with a tokenizer that is a pipe",
        _init("--tokenizer", "tok", change=lambda f: os.mkfifo(f / "tok")),
        2,
        ("`flipscale prepare tokenizer data DIR` makes one",),
        _none_proposed,
    ),
    Attack(
        "a proposal with a test set that is a pipe",
        _init("--tests", "p", change=lambda f: os.mkfifo(f / "p")),
        2,
        ("shard p is damaged (it is a FIFO",),
        _none_proposed,
    ),
    Attack(
        "a proposal for a billion GPUs", _init("--num_gpus", "1000000000"), 2, ("size is 1000000000",), _none_proposed
    ),
    Attack("a proposal for 10^300 hours", _init("--hours", "1e300"), 0, ("more pairs would teach it more",)),
    Attack("a proposal for 10^-300 hours", _init("--hours", "1e-300"), 2, ("less than a step takes",)),
    Attack("a proposal for nan hours", _init("--hours", "nan"), 2, ("--hours is nan",), _none_proposed),
    Attack(
        "a proposal for a GPU of control characters",
        _init("--gpu", "\x1b[2J"),
        2,
        ("gpu is '\\x1b[2J'",),
        _none_proposed,
    ),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
