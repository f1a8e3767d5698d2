"""Attacks on `checkpoints/`: a run goes on from the newest whole checkpoint."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from attacks import ground
from attacks.attack import Attack, Change, Ended, Make, later, refused, survived, test_of
from attacks.changes import exists, instead, nothing, text
from conftest import metrics

PART = "part-00000.safetensors"


@later
def after(folder: Path, damage: Change, up_to: int | None = 8) -> Sequence[str]:
    """A run that stopped after step 8, whose checkpoint is damaged; it has another of step 4."""
    run = ground.run_of(folder, up_to)
    damage(run / "checkpoints/step-00000008")
    return ground.pretrain(folder)


@later
def edited(checkpoint: Path, name: str, **fields: object) -> None:
    """Replace fields of a JSON file, without a change of the digests."""
    content = json.loads((checkpoint / name).read_text())
    (checkpoint / name).write_text(json.dumps({**content, **fields}))


@later
def flipped(checkpoint: Path, name: str, position: int) -> None:
    """Flip a bit; a negative position counts from the end."""
    content = bytearray((checkpoint / name).read_bytes())
    content[position] ^= 4
    (checkpoint / name).write_bytes(content)


@later
def of_step_4(checkpoint: Path, *names: str) -> None:
    for name in names:
        shutil.copy(checkpoint.with_name("step-00000004") / name, checkpoint / name)


def of_another_run(checkpoint: Path) -> None:
    """Make it a whole checkpoint of a run with another seed."""
    from flipscale.io.digests import digest_of, digests_to_json, read_digests

    recipe = (checkpoint / "recipe.yaml").read_text().replace("\nseed: 0\n", "\nseed: 1\n")
    (checkpoint / "recipe.yaml").write_text(recipe)
    digests = {**read_digests(checkpoint / "digests.json"), "recipe.yaml": digest_of(recipe.encode())}
    (checkpoint / "digests.json").write_text(digests_to_json(digests))


def of_a_newer_version(checkpoint: Path) -> None:
    edited("state.json", format=3, flipscale="9.1")(checkpoint)
    (checkpoint / "digests.json").write_text("another way")


def beside(checkpoint: Path) -> None:
    """Write folders that are no checkpoints, and a newer, empty checkpoint."""
    for name in ("step-abc", "step-8", "step-0000000009", "step-\uff10000000\u0669", "step-00000009~", "STEP-00000009"):
        shutil.copytree(checkpoint, checkpoint.with_name(name))
    checkpoint.with_name("step-99999999").mkdir()
    checkpoint.with_name("step-123456789012345678901234567890").mkdir()
    checkpoint.with_name(".step-00000009.partial").mkdir()
    checkpoint.with_name(".step-00000007.partial").write_text("half")
    (checkpoint / "part-00001.safetensors").write_text("of nobody")
    (checkpoint / "note.txt").write_text("mine")


def behind_a_link(checkpoint: Path) -> None:
    elsewhere = checkpoint.parents[2] / "elsewhere"
    checkpoint.rename(elsewhere)
    checkpoint.symlink_to(elsewhere)


def dangling(path: Path) -> None:
    path.symlink_to("/nowhere/step-00000008")


def whole_of_step_4(checkpoint: Path) -> None:
    shutil.copytree(checkpoint.with_name("step-00000004"), checkpoint)


empty = instead(Path.mkdir)


def twice(checkpoint: Path) -> None:
    checkpoint.with_name("bad-step-00000008").mkdir()
    empty(checkpoint)


def all_empty(checkpoint: Path) -> None:
    for one in checkpoint.parent.iterdir():
        empty(one)


def both_newer(checkpoint: Path) -> None:
    empty(checkpoint)
    flipped(PART, -1)(checkpoint.with_name("step-00000010"))
    (checkpoint.parents[1] / "DONE").unlink()
    shutil.rmtree(checkpoint.parents[1] / "model")


def without_folder(make: Change) -> Make:
    """A run whose folder of checkpoints is something else."""
    return after(lambda checkpoint: instead(make)(checkpoint.parent))


def ends_alike(folder: Path) -> None:
    """Assert that the run learned the same as one without an attack."""
    assert (folder / "run/DONE").exists()
    ends = [[r["loss"] for r in metrics(run) if "loss" in r] for run in (ground._trained() / "run", folder / "run")]
    assert len(ends[0]) == 10
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)


@later
def went_on_from(folder: Path, ended: Ended, step: int, *set_aside: str) -> None:
    """Check that the run went on from the checkpoint of `step`, and kept the bad ones."""
    ends_alike(folder)
    start = json.loads((folder / "run/starts.jsonl").read_text().splitlines()[-1])
    assert (start["step"], start["set_aside"]) == (step, list(set_aside))
    for name in set_aside:
        assert os.path.lexists(folder / "run/checkpoints" / f"bad-{name}")
    assert ended.stderr.count("is unusable") == len(set_aside)


def set_aside(name: str, damage: Change, *why: str, world: int = 1) -> Attack:
    """A newest checkpoint that is not whole: the run continues from the one before, to the same losses."""
    says = ("bad-step-00000008", "step-00000004", *why)
    return Attack(name, after(damage), 0, says, went_on_from(4, "step-00000008"), world=world)


def as_it_was(folder: Path, ended: Ended) -> None:
    names = sorted(os.listdir(folder / "run/checkpoints"))
    assert names == ["step-00000004", "step-00000008"]


@later
def ends_with(folder: Path, ended: Ended, name: str) -> None:
    """Check that the run learned the same, and that a file exists."""
    ends_alike(folder)
    exists(name)(folder, ended)


def kept_what_is_not_ours(folder: Path, ended: Ended) -> None:
    names = os.listdir(folder / "run/checkpoints")
    assert {"step-abc", "step-8", "step-00000009~", "STEP-00000009", "step-0000000009"} <= set(names)
    assert {"bad-step-99999999", "bad-step-123456789012345678901234567890"} <= set(names)
    assert not [name for name in names if name.startswith(".")]
    went_on_from(8, "step-123456789012345678901234567890", "step-99999999")(folder, ended)


def lost_recipe(checkpoint: Path) -> None:
    (checkpoint.parents[1] / "recipe.yaml").unlink()


def torn_metrics(checkpoint: Path) -> None:
    with open(checkpoint.parents[1] / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "loss": 3.0}\n{"step": 4, "lo')
    empty(checkpoint)


@later
def export(folder: Path, *arguments: str) -> Sequence[str]:
    run = ground.run_of(folder)
    flipped(PART, -9)(run / "checkpoints/step-00000010")
    return ["export", "run", *arguments]


def status(folder: Path) -> Sequence[str]:
    beside(ground.run_of(folder, 8) / "checkpoints/step-00000008")
    return ["status", "run"]


def never(folder: Path) -> Sequence[str]:
    lost_recipe(ground.run_of(folder, 8) / "checkpoints/step-00000008")
    return [*ground.pretrain(folder), "--resume_from_checkpoint", "never"]


AS_IT_WAS = {"check": as_it_was, "alone": True}
TWICE = "bad-step-00000008"
SMALLER = {"bounds": {}, "shapes": {}}
STATE, COPY, DIGESTS, INDEX = "state.json", "recipe.yaml", "digests.json", "index.json"
ATTACKS = [
    set_aside("an empty folder of a step", empty, STATE),
    set_aside("a checkpoint that is a file", instead(Path.touch), STATE),
    set_aside("a link to a checkpoint that is gone", instead(dangling), STATE),
    set_aside("a part cut short", lambda c: os.truncate(c / PART, 5000), PART, "5,000 bytes"),
    set_aside("a part with bytes behind it", lambda c: os.truncate(c / PART, 10**7), PART, "10,000,000 bytes"),
    set_aside("a part that is missing", instead(nothing, PART), PART, "missing"),
    set_aside("a part that is a pipe", instead(os.mkfifo, PART), PART),
    set_aside("a part that is an endless device", instead(lambda f: f.symlink_to("/dev/zero"), PART), PART),
    set_aside("a flipped bit in a part", flipped(PART, -1), PART, "bytes 0"),
    set_aside("a flipped bit in a part's header", flipped(PART, 60), PART),
    set_aside("a flipped bit that another process reads", flipped(PART, -1), PART, world=2),
    set_aside("a part of the step before", of_step_4(PART), PART),
    set_aside("a part and the index of the step before", of_step_4(PART, INDEX), PART),
    set_aside("the state of the step before", of_step_4(STATE), STATE),
    set_aside("the step before under another name", instead(whole_of_step_4), STATE, "step 4"),
    set_aside("a state of step 999999", edited(STATE, step=999999), STATE),
    set_aside("an empty state", text(STATE, b""), STATE),
    set_aside("a state of random bytes", text(STATE, bytes(range(256))), STATE),
    set_aside("a state that is a list", text(STATE, b"[8]"), STATE),
    set_aside("a state nested 100,000 deep", text(STATE, "[" * 100_000), STATE),
    set_aside("a state of 20 GiB", lambda c: os.truncate(c / STATE, 20 * 2**30), STATE, "21,474,836,480 bytes"),
    set_aside("a flipped bit in the index", flipped(INDEX, -3), INDEX),
    set_aside("an index of a shortened tensor", edited(INDEX, **SMALLER), INDEX),
    set_aside("a broken copy of the recipe", text(COPY, b"{a: ["), COPY),
    set_aside("a checkpoint of another run", of_another_run, "seed: 1", "0"),
    set_aside("digests that are missing", instead(nothing, DIGESTS), DIGESTS),
    set_aside("digests of nothing", text(DIGESTS, b"{}"), DIGESTS),
    set_aside("metrics ahead of the checkpoint taken, the last line torn", torn_metrics, STATE),
    survived(
        "two damaged checkpoints, one of them of the last step", after(both_newer, up_to=None),
        "step-00000010", "step-00000008", "step-00000004", check=went_on_from(4, "step-00000010", "step-00000008"),
    ),
    survived("a checkpoint set aside twice", after(twice), f"{TWICE}.2", check=ends_with(f"run/checkpoints/{TWICE}.2")),
    refused("no checkpoint is whole", after(all_empty), "step-00000008", "step-00000004", STATE, **AS_IT_WAS),
    refused("a checkpoint of a newer version", after(of_a_newer_version), "format", "3", "9.1", **AS_IT_WAS),
    survived("a checkpoint behind a link", after(behind_a_link), check=ends_with("elsewhere/state.json")),
    survived("names that are almost checkpoints', and leftovers", after(beside), check=kept_what_is_not_ours),
    survived("checkpoints of a run whose recipe is lost", after(lost_recipe), check=went_on_from(8)),
    Attack("the folder of checkpoints is a link to nothing", without_folder(dangling), 1, ("checkpoints",)),
    Attack("the folder of checkpoints is a file", without_folder(Path.touch), 1, ("checkpoints",)),
    refused("the run is not to be resumed, and its recipe is lost", never, "'never'"),
    Attack("a damaged checkpoint to export", export(), 1, ("step-00000010", "--step")),
    survived("an export of the one before", export("--step", "8"), "export-8"),
    refused("an export of no step", export("--step", "999"), "999", "step-00"),
    survived("status of names that are almost checkpoints'", status, "checkpoint"),
]  # fmt: skip

test_attack = test_of(ATTACKS)
