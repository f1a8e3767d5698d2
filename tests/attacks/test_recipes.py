"""Attacks by recipes, options and surroundings, all refused before anything is trained or measured."""

import contextlib
import shlex
import tarfile
from pathlib import Path
from typing import Any

import yaml
from attacks import ground
from attacks.attack import Attack, Change, Ended, Make, later, refused, survived, test_of
from attacks.changes import kept, lacks, mine, nothing, pipe, text
from conftest import write_tar

from flipscale.start.complete_recipe import parse_recipe

STAGE = {"name": "masked", "samples": 96, "mask_ratio": 0.75, "base_lr": 0.012}
BOMB = "a0: &a0 [1, 2]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
ODD_NAME = "da: {ta # 'x'} - \u202e!!python"


@later
def recipe(folder: Path, **changes: Any) -> list[str]:
    """A run with these changes."""
    ground.shards(folder)
    return ground.pretrain(folder, **changes)


def stages(**changes: Any) -> Make:
    return recipe(stages=[{**STAGE, **changes}])


def task(**fields: Any) -> Make:
    return recipe(eval={"tasks": [{"kind": "retrieval", "data": "data", **fields}]})


def written(content: str | bytes) -> Make:
    """A recipe of this text."""
    return lambda folder: text("odd.yaml", content)(folder) or ["pretrain", "--config", "odd.yaml"]


def extending(content: str) -> Make:
    """A recipe that extends a recipe of this text."""
    return lambda folder: text("base.yaml", content)(folder) or written("extends: base.yaml\n")(folder)


def flags(*words: str) -> Make:
    """The good recipe and these flags."""
    return lambda folder: [*recipe()(folder), *words]


def model(**fields: Any) -> Make:
    """Flags such as `--model.text_config.hidden_size` for text__hidden_size."""
    words = []
    for name, value in fields.items():
        tower, _, field = name.partition("__")
        words += [f"--model.{tower}_config.{field}", str(value)]
    return flags(*words)


@later
def command(folder: Path, *words: str) -> list[str]:
    """A command in a folder with a file named `file`."""
    (folder / "file").write_text("x")
    return list(words)


@later
def test_set(folder: Path, kind: str, odd: dict[str, bytes]) -> list[str]:
    """A run with an evaluation on 20 samples, of which number 13 is odd."""
    data = ground.shards(folder)
    with tarfile.open(data / "00000.tar") as tar:
        member = next(one for one in tar if one.name.endswith(".jpg"))
        image = tar.extractfile(member).read()  # type: ignore[union-attr]
    good = {"jpg": image, "txt": b"a red bar", "cls": b"1"}
    write_tar(folder / "test/00000.tar", ({**good, **(odd if number == 13 else {})} for number in range(20)))
    for file in data.glob("*.txt"):
        (folder / "test" / file.name).write_bytes(file.read_bytes())
    return ground.pretrain(folder, eval={"tasks": [{"kind": kind, "data": "test"}]})


test_set.__test__ = False  # type: ignore[attr-defined]


def row(name: str, make: Make, *says: str, **more: Any) -> Attack:
    return refused(name, make, *says, **{"check": lacks("run"), **more})


@later
def code(folder: Path, *words: str) -> list[str]:
    """A command beside a module that leaves a file when it is imported."""
    (folder / "evil.py").write_text("open('pwned', 'w')\nclass Data: pass\n")
    (folder / "odd.yaml").write_text("data: evil.Data\n")
    return ["pretrain", "--config", *words]


def saved_before(folder: Path) -> list[str]:
    """A finished run's own `recipe.yaml`, without some fields."""
    run = ground.run_of(folder)
    saved = yaml.safe_load((run / "recipe.yaml").read_text())
    del saved["loss"], saved["save"]["every_minutes"], saved["log"]["profile_steps"], saved["hub"]
    file = folder / "old.yaml"
    file.write_text(yaml.safe_dump(saved | {"output_dir": str(folder / "again"), "eval": {"zero_shot": "data"}}))
    return ["pretrain", "--config", str(file)]


@later
def init(folder: Path, *words: str, change: Change = nothing, shards: str = "data") -> list[str]:
    """A proposal for GPUs elsewhere, after `change`. Of equal flags the last one counts."""
    ground.shards(folder)
    change(folder)
    elsewhere = ["--gpu", "h100", "--num_gpus", "1", "--hours", "1"]
    return ["init", "mine.yaml", "--shards", shards, "--tokenizer", str(ground.tokenizer()), *elsewhere, *words]


@later
def init_to(folder: Path, name: str, change: Change = nothing) -> list[str]:
    verb, _, *words = init(change=change)(folder)
    return [str(verb), name, *map(str, words)]


def dangling(folder: Path) -> None:
    (folder / "mine.yaml").symlink_to("no")


def proposal(name: str, make: Make, *says: str, **more: Any) -> Attack:
    return refused(name, make, *says, **{"check": lacks("mine.yaml"), **more})


def names_shards(folder: Path, ended: Ended) -> None:
    assert yaml.safe_load((folder / "mine.yaml").read_text())["data"]["shards"] == ODD_NAME


def command_is_taken(folder: Path, ended: Ended) -> None:
    program, verb, *words = shlex.split(ended.stdout.split("next: ")[1])
    assert (program, verb) == ("flipscale", "pretrain")
    with contextlib.chdir(folder):
        assert parse_recipe(words).output_dir == "runs/-a b"


def recipe_alone(folder: Path) -> list[str]:
    ground.recipe(folder)
    return ["pretrain", "recipe.yaml", "--seed", "1"]


def without_captions(folder: Path) -> None:
    write_tar(folder / "odd/0.tar", [{"jpg": b"x"}] * 20)


def odd_beside_good(folder: Path) -> None:
    odd = [(b"", b"a"), (b"\xff\xd8", b"a"), (b"%!PS", b"a"), (b"x" * 999, b"\xff\0"), (b"GIF89a", b"a" * 10**6)]
    write_tar(folder / "data/00004.tar", ({"jpg": image, "txt": caption} for image, caption in odd))


PAGES = text("odd/0.tar", "<html>404</html>" * 999)
PICKLE = text("tok/tokenizer.json", b"\x80\x04cposix\nsystem\n")
RACE = ("study", "race", "small_cpu", "--output_dir")
TOKENIZER = "`flipscale prepare tokenizer data DIR`"
ATTACKS = [
    # Numbers of a recipe.
    row("eval.batch_size -1", recipe(eval={"batch_size": -1}), "eval.batch_size is -1"),
    row("a negative rate", stages(base_lr=-0.1), "stages[0].base_lr is -0.1"),
    row("a rate that is NaN", stages(base_lr=float("nan")), "stages[0].base_lr is nan"),
    row("max_grad_norm -1", recipe(optim={"max_grad_norm": -1}), "optim.max_grad_norm is -1.0"),
    row("a crop of five to nine times the image", recipe(data={"crop_scale": [5, 9]}), "data.crop_scale[0] is 5.0"),
    row("seed 10^30", recipe(seed=10**30), f"seed is {10**30}"),
    row("a seed of 500 digits", written("seed: " + "9" * 500), "500 digits"),
    row("batch size 0", recipe(data={"global_batch_size": 0}), "data.global_batch_size is 0"),
    row("a batch of 10^12 pairs", recipe(data={"global_batch_size": 10**12}), f"global_batch_size is {10**12}"),
    row("a step that may take for ever", recipe(log={"hang_seconds": float("inf")}), "log.hang_seconds is inf"),
    row("save.total_limit -1", recipe(save={"total_limit": -1}), "save.total_limit is -1"),
    row("adam_beta2 1", recipe(optim={"adam_beta2": 1.0}), "optim.adam_beta2 is 1.0"),
    row("workers -1", recipe(data={"num_workers": -1}), "data.num_workers is -1"),
    row("mask_ratio 1.0", stages(mask_ratio=1.0), "stages[0].mask_ratio is 1.0"),
    row("a word for a number", recipe(optim={"weight_decay": "some"}), "weight_decay", "some"),
    row("yes for a number", written("data: {num_workers: yes}\n"), "num_workers", "True"),
    row("a number of no value", written("data: {global_batch_size: }\n"), "data.global_batch_size"),
    row("R@0", task(ks=[0]), "eval.tasks[0].ks[0] is 0"),
    row("an evaluation every -5 samples", task(every_samples=-5), "eval.tasks[0].every_samples is -5"),
    row("10^9 captions of an image", recipe(loss={"captions_per_image": 10**9}), "captions_per_image is 1000000000"),
    row("10^9 views of an image", recipe(mask={"views": 10**9}), "mask.views is 1000000000"),
    refused("a recipe without --config", recipe_alone, "'recipe.yaml'", "--config recipe.yaml", check=lacks("run")),
    # The model of a recipe.
    row("heads that do not divide the width", model(vision__num_attention_heads=5), "num_attention_heads 5"),
    row("patch size 0", model(vision__patch_size=0), "patch_size is 0"),
    row("dropout -1", model(text__attention_dropout=-1), "attention_dropout is -1"),
    row("no positions", model(text__max_position_embeddings=0), "max_position_embeddings is 0"),
    row("a width of 10^9", model(text__hidden_size=10**9), "hidden_size is 1000000000"),
    row(
        "attention code of somebody's", model(vision___attn_implementation="someone/kernel"),
        "model.vision_config._attn_implementation",
    ),
    # Stages.
    row("no stages", recipe(stages=[]), "stages"),
    row("no samples", stages(samples=0), "stages[0].samples is 0"),
    row("samples with an exponent", stages(samples=1e6), "stages: samples", "a whole number in digits", "1000000.0"),
    row("fewer samples than a batch", stages(samples=7), "7", "16"),
    row("two stages of one name", recipe(stages=[STAGE, STAGE]), "'masked'"),
    row("an unknown field of a stage", stages(mask_rato=0.5), "stages[0].mask_rato"),
    # YAML.
    row("a bomb of aliases", written(BOMB), "odd.yaml", "aliases"),
    row("an alias of itself", written("model: &x {size: *x}\n"), "odd.yaml", "alias"),
    row("lists nested 900 deep", written("a: " + "[" * 900 + "]" * 900), "odd.yaml", "nested"),
    row(
        "a tag that runs a command", written("seed: !!python/object/apply:os.system ['touch pwned']\n"),
        "tag:yaml.org,2002:python/object/apply:os.system", check=lacks("pwned"),
    ),
    row("a class to import for a section", code("odd.yaml"), "data", "evil.Data", check=lacks("pwned")),
    row("a class to import in a flag", code("small_cpu", "--data", "evil.Data"), "evil.Data", check=lacks("pwned")),
    row("an octal number", written("seed: 010\n"), "010"),
    row("a key twice", written("seed: 1\nseed: 2\n"), "seed", "line 2"),
    row("tabs", written("data:\n\tnum_workers: 1\n"), "odd.yaml"),
    row("Latin-1", written(b"output_dir: caf\xe9\n"), "odd.yaml", "UTF-8"),
    row("an empty file", written(""), "empty"),
    row("a list at the top", written("- seed: 1\n"), "odd.yaml"),
    row("100 MB", written(b"#" * 100_000_000), "odd.yaml", "100,000,000", megabytes=400, alone=True),
    row("a folder for a recipe", lambda f: [(f / "odd").mkdir(), "pretrain", "--config", "odd"][1:], "odd", "folder"),
    row("a recipe that extends itself", written("extends: odd.yaml\n"), "odd.yaml", "extends"),
    row("a recipe that extends nothing", written("extends: none.yaml\n"), "odd.yaml", "extends 'none.yaml'"),
    row("a recipe that extends two", written("extends: [small_cpu, small_gpu]\n"), "odd.yaml", "extends", "small_cpu"),
    row("a list that extends a section", written("extends: small_cpu\noptim: [1]\n"), "odd.yaml", "optim"),
    row("an unknown key of the extended recipe", extending("optim: {weigth_decay: 1}\n"), "base.yaml", "weigth_decay"),
    row("an unknown key", written("optim: {weigth_decay: 1}\n"), "optim.weigth_decay"),
    # What is needed at the end.
    row("a tracker that is not installed", recipe(log={"report_to": ["aim"]}), "aim"),
    row("a file in place of the run's folder", lambda f: recipe(output_dir="file/run")(f) + command()(f), "file/run"),
    row("a NUL in a path", recipe(output_dir="a\0b"), "output_dir", "a\\x00b"),
    row("~ in a path", recipe(output_dir="~/run"), "output_dir", "~/run"),
    row("a name of 300 letters", recipe(output_dir="a" * 300), "255 bytes"),
    row("one damaged test image", test_set("retrieval", {"jpg": b"\xff\xd8\xff cut"}), "00000.tar", "13"),
    row("one test image without a caption", test_set("retrieval", {"txt": b"\n"}), "00000.tar#13"),
    row("one class number too high", test_set("zero_shot", {"cls": b"99"}), "00000.tar#13", "99"),
    # Other verbs' options.
    row("evaluate --batch_size 0", command("evaluate", "x", "--batch_size", "0"), "--batch_size is 0"),
    row("evaluate --num_workers -1", command("evaluate", "x", "--num_workers", "-1"), "--num_workers is -1"),
    row("evaluate --mask_ratio nan", command("evaluate", "x", "--mask_ratio", "nan"), "--mask_ratio is nan"),
    row("a probe with l2 inf", command("evaluate", "x", "--task", "{kind: probe, data: a, l2: .inf}"), "l2 is inf"),
    row("study --minutes nan", command(*RACE, "o", "--minutes", "nan"), "--minutes is nan"),
    row("export --step -4", command("export", "run", "--step", "-4"), "--step is -4"),
    row(
        "bench gpu --batch_size 10^12", command("bench", "gpu", "--batch_size", str(10**12)), f"{10**12}"
    ),
    row("RANK=x", flags(), "RANK", "'x'", environment={"RANK": "x"}),
    row("RANK=x in a dry run", flags("--dry_run"), "RANK", "'x'", environment={"RANK": "x"}),
    row("a flag that nearly is one", flags("--optim.weigth_decay", "1"), "--optim.weigth_decay"),
    row("study --output_dir FILE", command(*RACE, "file", "--minutes", "1"), "--output_dir", "'file'"),
    row("launch_files FILE", command("launch_files", "file"), "DIR", "'file'"),
    survived("a recipe that an older version saved", saved_before),
    # Proposals of a recipe.
    proposal(
        "a proposal over one's own recipe", init_to("mine.yaml", mine("mine.yaml")),
        "mine.yaml", check=kept("mine.yaml"),
    ),
    survived("a proposal whose name begins with a dash", init_to("./-a b.yaml"), check=command_is_taken),
    proposal("a proposal to a link to nothing", init_to("mine.yaml", dangling), "mine.yaml"),
    proposal("a proposal to a pipe", init_to("mine.yaml", pipe("mine.yaml")), "mine", check=None),
    proposal("a proposal in a file", init_to("file/mine.yaml", lambda f: (f / "file").touch()), "file", "folder"),
    proposal("a proposal of a name that is no text", init_to("\udcff.yaml"), "recipe"),
    proposal("a proposal of a name of 300 letters", init_to("x" * 300 + ".yaml"), "255 bytes"),
    proposal("a proposal for no shards", init(shards="*.tar"), "'*.tar'"),
    proposal("a proposal for shards that are pages", init(shards="odd", change=PAGES), "odd", "0 pairs", "16"),
    proposal("a proposal for pictures without captions", init(shards="odd", change=without_captions), "20 samples"),
    survived("a proposal for odd pairs beside good ones", init(change=odd_beside_good), "101 pairs"),
    survived(
        "a proposal for shards whose name is YAML",
        init(shards=ODD_NAME, change=lambda f: (f / "data").rename(f / ODD_NAME)), "96 pairs", check=names_shards,
    ),
    proposal(
        "a proposal for shards whose name is no text",
        init(shards="\udcff", change=lambda f: (f / "data").rename(f / "\udcff")), "shards",
    ),
    proposal("a proposal with a tokenizer of code", init("--tokenizer", "tok", change=PICKLE), TOKENIZER),
    proposal(
        "a proposal with a tokenizer that is a pipe",
        init("--tokenizer", "tok", change=pipe("tok")), TOKENIZER,
    ),
    proposal(
        "a proposal with a test set that is a pipe",
        init("--tests", "p", change=pipe("p")), "shard p", "FIFO",
    ),
    proposal("a proposal for a billion GPUs", init("--num_gpus", "1000000000"), "1000000000"),
    survived("a proposal for 10^300 hours", init("--hours", "1e300"), "more pairs"),
    proposal("a proposal for 10^-300 hours", init("--hours", "1e-300"), check=None),
    proposal("a proposal for nan hours", init("--hours", "nan"), "--hours is nan"),
    proposal("a proposal for a GPU of control characters", init("--gpu", "\x1b[2J"), "gpu", "'\\x1b[2J'"),
]  # fmt: skip

test_attack = test_of(ATTACKS)
