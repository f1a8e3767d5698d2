"""Attacks by a model folder: its configuration, weights, tokenizer, and the files next to them."""

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from attacks import ground
from attacks.attack import Change, Ended, Make, later, refused, survived, test_of
from attacks.changes import exists, lacks, nothing, pipe, text
from conftest import write_tar
from safetensors.torch import load_file, save_file

WEIGHT = "vision_model.encoder.layers.0.mlp.fc1.weight"
TEMPLATES = "zeroshot_classification_templates.txt"
EVALUATE = ("evaluate", "model", "--zero_shot", "data", "--num_workers", "0")
DEEP = b"[" * 100_000 + b"]" * 100_000


@later
def evaluated(folder: Path, damage: Change, arguments: Sequence[str] = EVALUATE) -> Sequence[str]:
    """Evaluate a trained model after `damage` to its folder."""
    ground.shards(folder)
    damage(ground.model(folder))
    return arguments


@later
def started_from(folder: Path, damage: Change, **changes: Any) -> Sequence[str]:
    """Train from a model after `damage` to its folder."""
    ground.shards(folder)
    damage(ground.model(folder))
    return ground.pretrain(folder, model={"init_from": str(folder / "model")}, **changes)


@later
def edited(model: Path, name: str, change: Callable[[dict], Any]) -> None:
    """Change the content of a JSON file."""
    content = json.loads((model / name).read_text())
    change(content)
    (model / name).write_text(json.dumps(content))


def config(**changes: Any) -> Change:
    """Change fields of config.json; TOWER__FIELD names a field of a tower."""

    def change(content: dict) -> None:
        for name, value in changes.items():
            *tower, field = name.split("__")
            (content[tower[0]] if tower else content)[field] = value

    return edited("config.json", change)


def tokenizer(change: Callable[[dict], Any], name: str = "tokenizer_config.json") -> Change:
    return edited(name, change)


@later
def weights(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    stored = load_file(model / "model.safetensors")
    change(stored)
    save_file(stored, model / "model.safetensors", {"format": "pt"})


def weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return weights(lambda stored: stored.update({WEIGHT: change(stored[WEIGHT]).contiguous()}))


def as_bytes(content: Any) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()


def header(content: Any, **tensor: Any) -> Change:
    """Weights with this header, or with one of this tensor."""
    stored = as_bytes(content if content is not None else {"a": {"dtype": "F32", **tensor}})
    return text("model.safetensors", struct.pack("<Q", len(stored)) + stored + bytes(64))


@later
def index(model: Path, content: Any) -> None:
    """An index in place of the file of weights, which moves out of the folder."""
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    (model / "model.safetensors.index.json").write_bytes(as_bytes(content))


@later
def outside(model: Path, name: str) -> None:
    """Move a file out of the folder and leave a link."""
    (model / name).rename(model.parent / name)
    (model / name).symlink_to(f"../{name}")


def code(model: Path) -> None:
    """Code that configuration and tokenizer name, and that leaves a file."""
    config(model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"})(model)
    tokenizer(lambda c: c.update(tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]}))(model)
    (model / "mine.py").write_text(f"open({str(model.parent / 'ran')!r}, 'w')\nclass Mine: pass\n")


@later
def without(model: Path, *names: str) -> None:
    for name in names:
        (model / name).unlink()


def bert_tokenizer(model: Path) -> None:
    """A tokenizer class of transformers that is empty without its files."""
    without("tokenizer.json")(model)
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')


def adapter(model: Path) -> None:
    """What PEFT writes: changes of a model, which is elsewhere."""
    without("config.json", "model.safetensors")(model)
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "base", "peft_type": "LORA"}')
    save_file({"a": torch.zeros(1)}, model / "adapter_model.safetensors")


@later
def native(folder: Path, family: str, damage: Change, arguments: Sequence[str]) -> Sequence[str]:
    """Evaluate or train from a model of transformers' own class, or from a timm and a text tower, after `damage`."""
    ground.shards(folder)
    ground.native(folder, family)
    damage(folder / "model")
    return arguments


def start_native(family: str, damage: Change) -> Make:
    def make(folder: Path) -> Sequence[str]:
        starts = {"vision": str(folder / "model"), "text": str(folder / "text")}
        starts = starts if family == "towers" else {"init_from": str(folder / "model")}
        small = {"size": "b16", "vision_config": {}, "text_config": {}}
        command = ground.pretrain(folder, model={"family": family, **small, **starts}, data={"tokenizer": "bert"})
        return native(family, damage, command)(folder)

    return make


@later
def sharded(model: Path, content: bytes) -> None:
    """Weights with an index, beside a pickle."""
    weights = model / "model.safetensors"
    names = list(load_file(weights))
    weights.rename(model / "model-00001-of-00001.safetensors")
    listed = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    (model / "pytorch_model.bin").write_bytes(content)


def many_unknown(stored: dict[str, torch.Tensor]) -> None:
    stored.update({f"unknown.{number}": torch.zeros(1) for number in range(100_000)})


def counts_unknown(folder: Path, ended: Ended) -> None:
    assert "100000 are left out: unknown.0, " in ended.stderr
    assert len(ended.stderr) < 20_000


def pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"a": 1}, model / "pytorch_model.bin")


SPLIT = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
REFUSED = {
    "a width of 0": (config(vision_config__hidden_size=0), "hidden_size is 0"),
    "a width in quotes": (config(text_config__hidden_size="32"), "'hidden_size'", "str"),
    "a width of null": (config(vision_config__hidden_size=None), "'hidden_size'", "NoneType"),
    "no heads": (config(vision_config__num_attention_heads=0), "num_attention_heads is 0"),
    "heads that do not divide": (config(text_config__num_attention_heads=3), "num_attention_heads 3"),
    "patches of 0 pixels": (config(vision_config__patch_size=0), "patch_size is 0"),
    "images of 800 million pixels": (config(vision_config__image_size=8 * 10**8), "image_size is 800000000"),
    "a million layers": (config(vision_config__num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    "a vocabulary of ten billion": (config(text_config__vocab_size=10**10), "vocab_size is 10000000000"),
    "an epsilon of NaN": (config(vision_config__layer_norm_eps=float("nan")), "layer_norm_eps is nan"),
    "a mean of two channels": (config(vision_config__image_mean=[0.5, 0.5]), "image_mean", "3"),
    "a deviation of 0": (config(vision_config__image_std=0.0), "image_std is 0.0"),
    "padding outside of the vocabulary": (config(text_config__pad_token_id=99), "pad_token_id is 99"),
    "a tower that is a list": (config(vision_config=[1]), "vision_config is [1]"),
    "a tower that is a number": (config(text_config=3), "text_config is 3"),
    "a configuration that is a pipe": (pipe("config.json"), "config.json"),
    "a configuration that is a list": (text("config.json", "[]"), "config.json"),
    "a configuration nested 100,000 deep": (text("config.json", DEEP), "config.json"),
    "a field twice": (text("config.json", '{"model_type": "flip", "model_type": "x"}'), "'model_type'"),
    "a layer too few": (config(text_config__num_hidden_layers=1), "unexpected keys", "text_model.enc"),
    "NaN weights": (weight(lambda w: w * float("nan")), WEIGHT, "NaN"),
    "one infinite weight": (weight(lambda w: w.index_fill(0, torch.tensor(3), float("inf"))), WEIGHT, "infinite"),
    "weights that overflow": (weight(lambda w: w * 1e38), "image", "NaN"),
    "integer weights": (weight(lambda w: w.to(torch.int32)), WEIGHT, "int32"),
    "a transposed weight": (weight(lambda w: w.t()), WEIGHT, "[32, 64]", "[64, 32]"),
    "a weight missing": (weights(lambda stored: stored.pop(WEIGHT)), "missing keys", WEIGHT),
    "a header that is a list": (header([]), "header"),
    "a header of 40 MB": (header(b" " * (40 << 20)), "header"),
    "a header with negative places": (header(None, shape=[16], data_offsets=[-64, 64]), "header"),
    "a header of 2 ** 62 numbers": (header(None, shape=[2**62], data_offsets=[0, 64]), "header"),
    "an index that leads out": (index({"weight_map": {WEIGHT: "../outside.safetensors"}}), "../outside.safetensors"),
    "an index that is a list": (index([]), "model.safetensors.index.json"),
    "an index without a map": (index({}), "model.safetensors.index.json", "weight_map"),
    "an index nested 100,000 deep": (index(DEEP), "model.safetensors.index.json"),
    "weights that are a link": (outside("model.safetensors"), "model.safetensors", "outside"),
    "a tokenizer that is a link": (outside("tokenizer.json"), "tokenizer.json", "outside"),
    "no tokenizer files": (without("tokenizer.json"), "model has no tokenizer files"),
    "no tokenizer files of a class that makes an empty one": (bert_tokenizer, "model has no tokenizer files"),
    "an adapter without its model": (adapter, "adapter", "'base'"),
    "a tokenizer that is a pipe": (pipe("tokenizer.json"), "tokenizer.json"),
    "a tokenizer nested 100,000 deep": (text("tokenizer.json", DEEP), "tokenizer.json"),
    "a tokenizer's settings as a list": (text("tokenizer_config.json", "[]"), "tokenizer_config.json", "[]"),
    "a tokenizer of another vocabulary": (
        tokenizer(lambda c: c["model"]["vocab"].update(red=999), "tokenizer.json"), "1000", "vocab_size", "16",
    ),
    "a tokenizer without padding": (tokenizer(lambda c: c.pop("pad_token")), "tokenizer", "None"),
    "an expression that cannot be": (tokenizer(lambda c: c.update(pre_tokenizer=SPLIT), "tokenizer.json"), "tokenizer"),
    "weights as a pickle": (pickle, "pytorch_model.bin"),
}  # fmt: skip


def beside(name: str, content: str | bytes) -> Make:
    """Write a text of the test set."""
    return evaluated(text(f"../data/{name}", content))


def task(content: str) -> Make:
    return evaluated(nothing, ("evaluate", "model", "--task", content))


def two_models(model: Path) -> None:
    shutil.copytree(model, model.parent / "other")
    text("config.json", "[]")(model)


def pushed(damage: Change) -> Make:
    return evaluated(damage, ("push", "model", "org/name", "--dry_run"))


def others(damage: Change) -> Make:
    """Evaluate the folder as somebody else's model, by transformers."""
    return evaluated(damage, ("evaluate", "hf:model", *EVALUATE[2:]))


def secrets(model: Path) -> None:
    for name in (".env", "id_rsa", "README.md~", "notes.txt", "train.py", "checkpoint.pt"):
        (model / name).write_text("a secret")
    (model / ".git").mkdir()
    (model / ".git/config").write_text("a secret")
    (model / "passwords.json").symlink_to("/etc/passwd")
    pipe("pipe")(model)


def names_no_secret(folder: Path, ended: Ended) -> None:
    listed, left_out = ended.stdout.split("left out")
    assert "model.safetensors" in listed
    assert not any(word in listed for word in (".env", "id_rsa", "README.md~", "notes", "train", ".pt", ".git", "pass"))
    assert all(word in left_out for word in (".env", ".git", "README.md~", "checkpoint.pt"))


def evaluates_other(folder: Path, ended: Ended) -> None:
    exists("other/results.jsonl")(folder, ended)
    lacks("model/results.jsonl")(folder, ended)


def results_link(model: Path) -> None:
    (model / "results.jsonl").symlink_to("../elsewhere")


LINE = {"group": "g", "lines": 1, "weights": "w", "task": "t", "kind": "k", "metric": "m", "value": 1.0, "data": {}}
RESULTS = {
    "results of another program": '{"a": 1}\n',
    "results nested 100,000 deep": DEEP + b"\n",
    "results whose group is a list": json.dumps({**LINE, "group": [1]}) + "\n",
    "results whose value is a text": json.dumps({**LINE, "value": "high"}) + "\n",
}
NAN = weight(lambda w: w * float("nan"))
CODE_TASK = "!!python/object/apply:os.mkdir [ran]"
KERNEL = config(attn_implementation="their/kernel")
LEADS_OUT = index({"weight_map": {WEIGHT: "../outside.safetensors"}})
DEEP_HEADER = b"---\n" + b"[" * 20_000 + b"\n---\n\n## Results\n\nflipscale"
PIXELS = ("preprocessor_config.json", "processor_config.json")
OWN = EVALUATE
OTHER = ("evaluate", "hf:model", *EVALUATE[2:])
BAD_HEADER = "---\n: : [\n---\n\n## Results\n\nflipscale"


@later
def replayed(folder: Path, captions: list[bytes], option: str) -> list[str]:
    """A search for a recipe from a model, with pairs of these captions as the option."""
    ground.shards(folder)
    pictures = [cv2.imencode(".png", np.full((40, 40, 3), n, np.uint8))[1].tobytes() for n in range(len(captions))]
    pairs = zip(pictures, captions, strict=True)
    write_tar(folder / "odd/0.tar", ({"png": picture, "txt": caption} for picture, caption in pairs))
    places = {"--shards": "data", option: "odd"}
    words = ["init", "mine.yaml", "--start", str(ground.trained_model()), "--minutes", "0.01"]
    return [*words, *(word for pair in places.items() for word in pair)]


ATTACKS = [
    refused("old pairs without captions", replayed([b" "] * 20, "--replay"), "odd: old pairs", "none of 20 samples"),
    refused(
        "a tenth of the old pairs without captions", replayed([b" ", b" ", *[b"a disc"] * 18], "--replay"),
        "10% of 20 sampled pairs", "data.max_bad_fraction 0.05",
    ),
    refused("one caption for all new pairs", replayed([b"a disc"] * 40, "--shards"), "8 of 40 pairs", "1 captions"),
    *(
        refused(name, evaluated(text("results.jsonl", content)), "results.jsonl", "flipscale evaluate")
        for name, content in RESULTS.items()
    ),
    refused("results that are a pipe", evaluated(pipe("results.jsonl")), "results.jsonl"),
    refused("results that are a link", evaluated(results_link), "results.jsonl", check=lacks("elsewhere")),
    refused("prompts without the name", beside(TEMPLATES, "a {c}\na photo\n"), "'a photo'"),
    refused("a million prompts", beside(TEMPLATES, "a {c}\n" * 10**6), "1,000,000"),
    refused("prompts of 30 MB", beside(TEMPLATES, "a {c}\n" * 5_000_000), "30,000,000", alone=True),
    refused("a class name of a megabyte", beside("classnames.txt", "x" * 10**6), "1,000,000"),
    refused("class names that are a pipe", evaluated(pipe("../data/classnames.txt")), "classnames.txt"),
    survived("one name for all classes", beside("classnames.txt", "a\n" * 16), "more than once"),
    refused("a task of no kind", task("{kind: [zero_shot], data: data}"), "kind", "['zero_shot']"),
    refused("a task nested 20,000 deep", task("[" * 20_000), "--task"),
    refused("a task that is code", task(CODE_TASK), "--task", check=lacks("ran")),
    refused(
        "one of two models is no model", evaluated(two_models, ("evaluate", "model", "other", *EVALUATE[2:])),
        "1 of 2 models", "config.json", check=evaluates_other,
    ),
    survived("a card that is no text", evaluated(text("README.md", b"\xff\xfe")), "README.md"),
    survived("a card whose header is none", evaluated(text("README.md", BAD_HEADER)), "README.md"),
    refused("an adapter of another's model", others(text("adapter_config.json", "{}")), "adapter"),
    refused("another's model that brings code", others(code), "custom code", check=lacks("ran")),
    refused("another's model whose index leads out", others(index({"weight_map": {"a": "/etc/passwd"}})), "/passwd'"),
    refused("another's model with a kernel", others(KERNEL), "config.json", "attn_implementation"),
    refused("another's model with NaN", others(NAN), "NaN"),
    survived("secrets in a folder to push", pushed(secrets), check=names_no_secret),
    refused("a link in place of the card to push", pushed(outside("README.md")), "README.md"),
    refused("NaN weights to push", pushed(NAN), WEIGHT),
    refused("half a model to push", pushed(index({"weight_map": {"a": "b.safetensors"}})), "b.safetensors"),
    *(refused(name, evaluated(damage), *says) for name, (damage, *says) in REFUSED.items()),
    refused("a model that brings its code", evaluated(code), "'mine'", check=lacks("ran")),
    survived("a model of ten billion labels", evaluated(config(num_labels=10**10)), "top-1"),
    survived("a model that names a kernel", evaluated(KERNEL), "top-1"),
    survived(
        "a tokenizer of other inputs", evaluated(tokenizer(lambda c: c.update(model_input_names=["x"]))), "top-1"
    ),
    survived("a card nested 20,000 deep", evaluated(text("README.md", DEEP_HEADER)), "README.md"),
    survived(
        "a card nested 20,000 deep to convert",
        evaluated(text("README.md", DEEP_HEADER), ("convert", "open_clip", "model", "out")), "README.md", "licence",
        check=exists("out/open_clip_config.json"), alone=True,
    ),
    refused(
        "another's model without tokenizer files", native("clip", without("tokenizer.json"), OTHER),
        "model has no tokenizer files",
    ),
    refused(
        "a CLIPModel without image processor", native("clip", without(*PIXELS), OWN), "preprocessor_config.json"
    ),
    refused("another's model without image processor", native("clip", without(*PIXELS), OTHER), "image processor"),
    refused(
        "no tokenizer files to start from", start_native("clip", without("tokenizer.json")),
        "data.tokenizer", "model has no tokenizer files",
    ),
    refused("a pipe to start from", start_native("clip", pipe("config.json")), "config.json"),
    refused("a list to start from", start_native("clip", config(vision_config=[1])), "vision_config is [1]"),
    refused("a tower of text to start from", start_native("siglip", config(text_config="x")), "text_config is 'x'"),
    refused(
        "a tower's width in quotes", native("clip", config(vision_config__hidden_size="x"), OWN), "'hidden_size'", "str"
    ),
    refused(
        "LoRA of rank 10^9", started_from(nothing, optim={"lora": {"rank": 10**9}}),
        "optim.lora.rank is 1000000000", "32",
    ),
    refused(
        "another vocabulary to start from",
        started_from(tokenizer(lambda c: c["model"]["vocab"].update(red=5, green=4), "tokenizer.json")),
        "data.tokenizer", "2 pieces", "model.text_rows",
    ),
    refused("an adapter to start from", started_from(adapter), "model.init_from", "adapter", "'base'"),
    refused("an adapter to start a CLIP from", start_native("clip", adapter), "adapter", "'base'"),
    refused(
        "ten million blocks in timm's file", start_native("towers", config(model_args__depth=10**7)),
        "model.vision", "depth is 10000000",
    ),
    refused(
        "a width of ten billion in timm's file", start_native("towers", config(model_args__embed_dim=10**10)),
        "model.vision", "embed_dim is 10000000000",
    ),
    survived("a timm tower in parts beside a pickle", start_native("towers", sharded(b"\x80junk")), "image tower"),
    survived(
        "100,000 unknown weights to start from", started_from(weights(many_unknown)), check=counts_unknown,
        long=True,
    ),
    refused("NaN weights to start from", started_from(NAN), "model.init_from", "NaN"),
    refused(
        "weights to start from that are elsewhere", started_from(LEADS_OUT), "model.init_from", "../outside.safetensors"
    ),
]  # fmt: skip

test_attack = test_of(ATTACKS)
