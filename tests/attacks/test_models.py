"""Attacks by a model: its configuration, weights, tokenizer, and what stands beside them."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks import ground
from attacks.attack import Attack, Ended, hold
from safetensors.torch import load_file, save_file

WEIGHT = "vision_model.encoder.layers.0.mlp.fc1.weight"
TEMPLATES = "zeroshot_classification_templates.txt"
EVALUATE = ("evaluate", "model", "--zero_shot", "data", "--num_workers", "0")
DEEP = b"[" * 100_000 + b"]" * 100_000
Make = Callable[[Path], Sequence[str | Path]]


def evaluated(damage: Callable[[Path], Any], arguments: Sequence[str] = EVALUATE) -> Make:
    """Evaluate a trained model after `damage` was done to its folder."""

    def make(folder: Path) -> Sequence[str]:
        ground.shards(folder)
        damage(ground.model(folder))
        return arguments

    return make


def started_from(damage: Callable[[Path], Any]) -> Make:
    """Train from a model after `damage` was done to its folder."""

    def make(folder: Path) -> Sequence[str]:
        ground.shards(folder)
        damage(ground.model(folder))
        return ground.pretrain(folder, model={"init_from": str(folder / "model")})

    return make


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda model: (model / name).write_bytes(content.encode() if isinstance(content, str) else content)


def config(**changes: Any) -> Callable[[Path], Any]:
    """Changes fields of config.json; `TOWER__FIELD` is a field of a tower."""

    def change(model: Path) -> None:
        content = json.loads((model / "config.json").read_text())
        for name, value in changes.items():
            *tower, field = name.split("__")
            (content[tower[0]] if tower else content)[field] = value
        (model / "config.json").write_text(json.dumps(content))

    return change


def tokenizer(change: Callable[[dict], Any], name: str = "tokenizer_config.json") -> Callable[[Path], Any]:
    def write(model: Path) -> None:
        content = json.loads((model / name).read_text())
        change(content)
        (model / name).write_text(json.dumps(content))

    return write


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def write(model: Path) -> None:
        stored = load_file(model / "model.safetensors")
        change(stored)
        save_file(stored, model / "model.safetensors", {"format": "pt"})

    return write


def weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], Any]:
    return weights(lambda stored: stored.update({WEIGHT: change(stored[WEIGHT]).contiguous()}))


def header(content: Any, data: bytes = b"\0" * 64) -> Callable[[Path], Any]:
    """Weights whose header is this."""
    stored = content if isinstance(content, bytes) else json.dumps(content).encode()
    return text("model.safetensors", struct.pack("<Q", len(stored)) + stored + data)


def index(content: Any) -> Callable[[Path], Any]:
    """An index in place of the one file of weights, which is beside the folder."""

    def write(model: Path) -> None:
        (model / "model.safetensors").rename(model.parent / "outside.safetensors")
        (model / "model.safetensors.index.json").write_bytes(
            content if isinstance(content, bytes) else json.dumps(content).encode()
        )

    return write


def outside(name: str) -> Callable[[Path], Any]:
    """Moves a file out of the folder and leaves a link to it."""

    def link(model: Path) -> None:
        (model / name).rename(model.parent / name)
        (model / name).symlink_to(f"../{name}")

    return link


def fifo(name: str) -> Callable[[Path], Any]:
    def make(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return make


def code(model: Path) -> None:
    """Code that configuration and tokenizer ask for; it leaves a file."""
    config(model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"})(model)
    tokenizer(lambda c: c.update(tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]}))(model)
    (model / "mine.py").write_text(f"open({str(model.parent / 'ran')!r}, 'w')\nclass Mine: pass\n")


def pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"a": 1}, model / "pytorch_model.bin")


def ran_nothing(folder: Path, ended: Ended) -> None:
    assert not (folder / "ran").exists()


REFUSED = {
    "a width of 0": (config(vision_config__hidden_size=0), "hidden_size is 0; it must be at least 1"),
    "a width in quotes": (config(text_config__hidden_size="32"), "'hidden_size' expected int, got str"),
    "a width of null": (config(vision_config__hidden_size=None), "'hidden_size' expected int, got NoneType"),
    "no heads": (config(vision_config__num_attention_heads=0), "num_attention_heads is 0; it must be at least 1"),
    "heads that do not divide": (config(text_config__num_attention_heads=3), "not divisible by num_attention_heads 3"),
    "patches of 0 pixels": (config(vision_config__patch_size=0), "patch_size is 0; it must be at least 1"),
    "images of 800 million pixels": (config(vision_config__image_size=8 * 10**8), "image_size is 800000000"),
    "a million layers": (config(vision_config__num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    "a vocabulary of ten billion": (config(text_config__vocab_size=10**10), "vocab_size is 10000000000"),
    "an epsilon of NaN": (config(vision_config__layer_norm_eps=float("nan")), "layer_norm_eps is nan"),
    "a mean of two channels": (config(vision_config__image_mean=[0.5, 0.5]), "one for each of 3 channels"),
    "a deviation of 0": (config(vision_config__image_std=0.0), "image_std is 0.0; it must be one number"),
    "padding outside of the vocabulary": (config(text_config__pad_token_id=99), "pad_token_id is 99"),
    "a tower that is a list": (config(vision_config=[1]), "is [1]; it must be an object with its fields"),
    "a configuration that is a list": (text("config.json", "[]"), "config.json is damaged: it is no JSON object"),
    "a configuration nested 100,000 deep": (text("config.json", DEEP), "config.json is damaged: it is nested too deep"),
    "a field twice": (text("config.json", '{"model_type": "flip", "model_type": "x"}'), "it has 'model_type' twice"),
    "a layer too few": (config(text_config__num_hidden_layers=1), "unexpected keys, such as text_model.enc"),
    "NaN weights": (weight(lambda w: w * float("nan")), f"weight {WEIGHT} has numbers that are NaN or infinite"),
    "one infinite weight": (weight(lambda w: w.index_fill(0, torch.tensor(3), float("inf"))), "NaN or infinite"),
    "weights that overflow": (weight(lambda w: w * 1e38), "embeds an image as numbers that are NaN or infinite"),
    "integer weights": (weight(lambda w: w.to(torch.int32)), f"weight {WEIGHT} is of type int32; it must be a float"),
    "a transposed weight": (weight(lambda w: w.t()), f"such as {WEIGHT} of shape [32, 64], not [64, 32]"),
    "a weight missing": (weights(lambda stored: stored.pop(WEIGHT)), f"1 missing keys, such as {WEIGHT}"),
    "a header that is a list": (header([]), "header cannot be read"),
    "a header of 40 MB": (header(b" " * (40 << 20)), "header cannot be read"),
    "a header with negative places": (
        header({"a": {"dtype": "F32", "shape": [16], "data_offsets": [-64, 64]}}), "header cannot be read"
    ),
    "a header of 2 ** 62 numbers": (
        header({"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 64]}}), "header cannot be read"
    ),
    "an index that leads out": (
        index({"metadata": {}, "weight_map": {WEIGHT: "../outside.safetensors"}}), "which is no safetensors file of the"
    ),
    "an index that is a list": (index([]), "model.safetensors.index.json is damaged: it is no JSON object"),
    "an index without a map": (index({}), "model.safetensors.index.json is damaged: it has no weight_map"),
    "an index nested 100,000 deep": (index(DEEP), "index.json is damaged: it is nested too deep"),
    "weights that are a link": (outside("model.safetensors"), "outside of the folder; put the file itself there"),
    "a tokenizer that is a link": (outside("tokenizer.json"), "outside of the folder; put the file itself there"),
    "a tokenizer that is a pipe": (fifo("tokenizer.json"), "tokenizer.json is no file"),
    "a tokenizer nested 100,000 deep": (text("tokenizer.json", DEEP), "tokenizer.json is damaged: it is nested too"),
    "a tokenizer's settings as a list": (text("tokenizer_config.json", "[]"), "it is no JSON object but []"),
    "a tokenizer of another vocabulary": (
        tokenizer(lambda c: c["model"]["vocab"].update(red=999), "tokenizer.json"),
        "the tokenizer has 1000 entries, the model's vocab_size is 16",
    ),
    "a tokenizer without padding": (tokenizer(lambda c: c.pop("pad_token")), "the tokenizer pads with id None"),
    "a tokenizer of other inputs": (tokenizer(lambda c: c.update(model_input_names=["x"])), "cannot embed"),
    "an expression that cannot be": (
        tokenizer(
            lambda c: c.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
            ),
            "tokenizer.json",
        ),
        "has no tokenizer that can be read",
    ),
    "weights as a pickle": (pickle, "has its weights as a pickle (pytorch_model.bin)"),
}  # fmt: skip


def beside(name: str, content: str | bytes) -> Callable[[Path], Any]:
    """Writes a text of the test set."""
    return lambda model: text(f"../data/{name}", content)(model)


def task(content: str) -> Make:
    return evaluated(lambda model: None, ("evaluate", "model", "--task", content))


def two_models(model: Path) -> None:
    shutil.copytree(model, model.parent / "other")
    text("config.json", "[]")(model)


def pushed(damage: Callable[[Path], Any]) -> Make:
    return evaluated(damage, ("push", "model", "org/name", "--dry_run"))


def secrets(model: Path) -> None:
    for name in (".env", "id_rsa", "README.md~", "notes.txt", "train.py", "checkpoint.pt"):
        (model / name).write_text("a secret")
    (model / ".git").mkdir()
    (model / ".git/config").write_text("a secret")
    (model / "passwords.json").symlink_to("/etc/passwd")
    os.mkfifo(model / "pipe")


def names_no_secret(folder: Path, ended: Ended) -> None:
    listed, told = ended.stdout.split("left out")
    assert "model.safetensors" in listed
    assert not any(word in listed for word in (".env", "id_rsa", "README.md~", "notes", "train", ".pt", ".git", "pass"))
    assert ".env, .git, README.md~, checkpoint.pt" in told


def other_is_evaluated(folder: Path, ended: Ended) -> None:
    assert (folder / "other/results.jsonl").exists()
    assert not (folder / "model/results.jsonl").exists()


def wrote_nothing_outside(folder: Path, ended: Ended) -> None:
    assert not (folder / "elsewhere").exists()


HF = ("evaluate", "hf:model", *EVALUATE[2:])
LINE = {"group": "g", "lines": 1, "weights": "w", "task": "t", "kind": "k", "metric": "m", "value": 1.0, "data": {}}
RESULTS = {
    "results of another program": '{"a": 1}\n',
    "results nested 100,000 deep": DEEP + b"\n",
    "results whose group is a list": json.dumps({**LINE, "group": [1]}) + "\n",
    "results whose value is a text": json.dumps({**LINE, "value": "high"}) + "\n",
}
ATTACKS = [
    *(
        Attack(name, evaluated(text("results.jsonl", content)), 2, ("is not a line of `flipscale evaluate`",))
        for name, content in RESULTS.items()
    ),
    Attack("results that are a pipe", evaluated(fifo("results.jsonl")), 2, ("results.jsonl is no file",)),
    Attack(
        "results that are a link",
        evaluated(lambda model: (model / "results.jsonl").symlink_to("../elsewhere")),
        *(2, ("results.jsonl is no file",), wrote_nothing_outside),
    ),
    Attack(
        "prompts without the name", evaluated(beside(TEMPLATES, "a {c}\na photo\n")), 2, ("'a photo'; each prompt",)
    ),
    Attack("a million prompts", evaluated(beside(TEMPLATES, "a {c}\n" * 10**6)), 2, ("1,000,000 prompts for each of",)),
    Attack("prompts of 30 MB", evaluated(beside(TEMPLATES, "a {c}\n" * 5_000_000)), 2, ("has 30,000,000 bytes",)),
    Attack(
        "a class name of a megabyte", evaluated(beside("classnames.txt", "x" * 10**6)), 2, ("1,000,000 characters",)
    ),
    Attack("class names that are a pipe", evaluated(fifo("../data/classnames.txt")), 2, ("classnames.txt is no file",)),
    Attack(
        "one name for all classes", evaluated(beside("classnames.txt", "a\n" * 16)), 0, ("more than once, such as",)
    ),
    Attack(
        "a task of no kind", task("{kind: [zero_shot], data: data}"), 2, ("kind is ['zero_shot']; it must be a text",)
    ),
    Attack("a task nested 20,000 deep", task("[" * 20_000), 2, ("--task",)),
    Attack("a task that is code", task("!!python/object/apply:os.mkdir [ran]"), 2, ("--task",), ran_nothing),
    Attack(
        "one of two models is no model",
        evaluated(two_models, ("evaluate", "model", "other", *EVALUATE[2:])),
        2,
        ("1 of 2 models were not evaluated", "config.json is damaged"),
        other_is_evaluated,
    ),
    Attack("a card that is no text", evaluated(text("README.md", b"\xff\xfe")), 0, ("README.md stays as it is",)),
    Attack(
        "a card whose header is none",
        evaluated(text("README.md", "---\n: : [\n---\n\n## Results\n\nflipscale")),
        0,
        ("README.md stays as it is",),
    ),
    Attack("an adapter of another's model", evaluated(text("adapter_config.json", "{}"), HF), 2, ("it is an adapter",)),
    Attack("another's model that brings code", evaluated(code, HF), 2, ("contains custom code",), ran_nothing),
    Attack(
        "another's model whose index leads out",
        evaluated(index({"weight_map": {"a": "/etc/passwd"}}), HF),
        2,
        ("'/etc/passwd', which is no file of the folder",),
    ),
    Attack(
        "another's model with a kernel",
        evaluated(config(attn_implementation="their/kernel"), HF),
        2,
        ("config.json sets attn_implementation",),
    ),
    Attack("another's model with NaN", evaluated(weight(lambda w: w * float("nan")), HF), 2, ("NaN or infinite",)),
    Attack(
        "secrets in a folder to push",
        pushed(secrets),
        0,
        ("left out, since flipscale did not write it",),
        names_no_secret,
    ),
    Attack("a link in place of the card to push", pushed(outside("README.md")), 2, ("README.md is ", "no file of the")),
    Attack("NaN weights to push", pushed(weight(lambda w: w * float("nan"))), 2, (f"weight {WEIGHT} has numbers",)),
    Attack("half a model to push", pushed(index({"weight_map": {"a": "b.safetensors"}})), 2, ("b.safetensors, which",)),
    *(Attack(name, evaluated(damage), 2, (says,)) for name, (damage, says) in REFUSED.items()),
    Attack("a model that brings its code", evaluated(code), 2, ("model_type 'mine'",), ran_nothing),
    Attack("a model of ten billion labels", evaluated(config(num_labels=10**10)), says=("written: model",)),
    Attack("a model that names a kernel", evaluated(config(attn_implementation="their/kernel")), says=("written",)),
    Attack(
        "NaN weights to start from", started_from(weight(lambda w: w * float("nan"))), 2, ("model.init_from", "NaN")
    ),
    Attack(
        "weights to start from that are elsewhere",
        started_from(index({"weight_map": {WEIGHT: "../outside.safetensors"}})),
        *(2, ("model.init_from", "'../outside.safetensors', which is no safetensors file of the folder")),
    ),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
