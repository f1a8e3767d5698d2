"""Attacks by what lies in `checkpoints/`: a run goes on from the newest checkpoint that is whole."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from attacks import ground
from attacks.attack import Attack, Ended, hold
from conftest import metrics

PART = "part-00000.safetensors"


def after(damage: Callable[[Path], None], up_to: int | None = 8) -> Callable[[Path], Sequence[str]]:
    """The command of a run that was stopped after step 8, whose checkpoint was damaged; another one is of step 4."""

    def make(folder: Path) -> Sequence[str]:
        run = ground.run_of(folder, up_to)
        damage(run / "checkpoints/step-00000008")
        return ground.pretrain(folder)

    return make


def edited(name: str, **fields: object) -> Callable[[Path], None]:
    """Replaces fields of a JSON file, and leaves the digests as they are."""

    def damage(checkpoint: Path) -> None:
        content = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps({**content, **fields}))

    return damage


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda checkpoint: _replace(checkpoint / name, lambda file: file.write_bytes(content))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    path.unlink()
    write(path)


def flipped(name: str, position: int) -> Callable[[Path], None]:
    """Flips a bit; a negative position counts from the end."""

    def damage(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[position] ^= 4
        (checkpoint / name).write_bytes(content)

    return damage


def _of_step_4(*names: str) -> Callable[[Path], None]:
    return lambda checkpoint: (
        [shutil.copy(checkpoint.with_name("step-00000004") / name, checkpoint / name) for name in names] and None
    )


def _all_of_step_4(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("step-00000004"), checkpoint)


def _as_a_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("step 8")


def _empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def _of_another_run(checkpoint: Path) -> None:
    """A whole checkpoint of a run of another seed, as that run would have written it."""
    from flipscale.io.digests import digest_of, digests_to_json, read_digests

    recipe = (checkpoint / "recipe.yaml").read_text().replace("\nseed: 0\n", "\nseed: 1\n")
    (checkpoint / "recipe.yaml").write_text(recipe)
    digests = {**read_digests(checkpoint / "digests.json"), "recipe.yaml": digest_of(recipe.encode())}
    (checkpoint / "digests.json").write_text(digests_to_json(digests))


def _of_a_newer_version(checkpoint: Path) -> None:
    edited("state.json", format=3, flipscale="9.1")(checkpoint)
    (checkpoint / "digests.json").write_text("another way")


def _huge(checkpoint: Path) -> None:
    os.truncate(checkpoint / "state.json", 20 * 2**30)


def _beside(checkpoint: Path) -> None:
    """What is no checkpoint, and a newer one that is empty."""
    for name in ("step-abc", "step-8", "step-0000000009", "step-\uff10000000\u0669", "step-00000009~", "STEP-00000009"):
        shutil.copytree(checkpoint, checkpoint.with_name(name))
    checkpoint.with_name("step-99999999").mkdir()
    checkpoint.with_name("step-123456789012345678901234567890").mkdir()
    checkpoint.with_name(".step-00000009.partial").mkdir()
    checkpoint.with_name(".step-00000007.partial").write_text("half")
    (checkpoint / "part-00001.safetensors").write_text("of nobody")
    (checkpoint / "note.txt").write_text("mine")


def _behind_a_link(checkpoint: Path) -> None:
    elsewhere = checkpoint.parents[2] / "elsewhere"
    checkpoint.rename(elsewhere)
    checkpoint.symlink_to(elsewhere)


def _dangling(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.symlink_to("/nowhere/step-00000008")


def _twice(checkpoint: Path) -> None:
    checkpoint.with_name("bad-step-00000008").mkdir()
    _empty(checkpoint)


def _all_empty(checkpoint: Path) -> None:
    for one in checkpoint.parent.iterdir():
        _empty(one)


def _both_newer(checkpoint: Path) -> None:
    _empty(checkpoint)
    flipped(PART, -1)(checkpoint.with_name("step-00000010"))
    (checkpoint.parents[1] / "DONE").unlink()
    shutil.rmtree(checkpoint.parents[1] / "model")


def _folder_gone(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint.parent)
    checkpoint.parent.symlink_to("/nowhere/checkpoints")


def _folder_a_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint.parent)
    checkpoint.parent.write_text("")


def ends_alike(folder: Path) -> None:
    """The run is done, and learned what one without an attack does."""
    assert (folder / "run/DONE").exists()
    ends = [[r["loss"] for r in metrics(run) if "loss" in r] for run in (ground._trained() / "run", folder / "run")]
    assert len(ends[0]) == 10
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)


def went_on_from(step: int, *set_aside: str) -> Callable[[Path, Ended], None]:
    """The run went on from the checkpoint of this step, and all that was set aside is still there."""

    def check(folder: Path, ended: Ended) -> None:
        ends_alike(folder)
        start = json.loads((folder / "run/starts.jsonl").read_text().splitlines()[-1])
        assert (start["step"], start["set_aside"]) == (step, list(set_aside))
        for name in set_aside:
            assert os.path.lexists(folder / "run/checkpoints" / f"bad-{name}")
        assert ended.stderr.count("is unusable") == len(set_aside)

    return check


def set_aside(name: str, damage: Callable[[Path], None], why: str, world: int = 1) -> Attack:
    """A newest checkpoint that is not whole: the run goes on from the one before, to the same losses."""
    says = (f"step-00000008 is unusable ({why}", "is kept as bad-step-00000008, and the run goes on from step-00000004")
    return Attack(name, after(damage), says=says, check=went_on_from(4, "step-00000008"), world=world)


def _as_it_was(folder: Path, ended: Ended) -> None:
    names = sorted(os.listdir(folder / "run/checkpoints"))
    assert names == ["step-00000004", "step-00000008"]


def _link_removed(folder: Path, ended: Ended) -> None:
    ends_alike(folder)
    assert (folder / "elsewhere/state.json").exists()


def _second_name(folder: Path, ended: Ended) -> None:
    ends_alike(folder)
    assert (folder / "run/checkpoints/bad-step-00000008.2").is_dir()


def _kept_what_is_not_ours(folder: Path, ended: Ended) -> None:
    names = os.listdir(folder / "run/checkpoints")
    assert {"step-abc", "step-8", "step-00000009~", "STEP-00000009", "step-0000000009"} <= set(names)
    assert {"bad-step-99999999", "bad-step-123456789012345678901234567890"} <= set(names)
    assert not [name for name in names if name.startswith(".")]
    went_on_from(8, "step-123456789012345678901234567890", "step-99999999")(folder, ended)


def _lost_recipe(checkpoint: Path) -> None:
    (checkpoint.parents[1] / "recipe.yaml").unlink()


def _torn_metrics(checkpoint: Path) -> None:
    with open(checkpoint.parents[1] / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "loss": 3.0}\n{"step": 4, "lo')
    _empty(checkpoint)


def _export(*arguments: str) -> Callable[[Path], Sequence[str]]:
    def make(folder: Path) -> Sequence[str]:
        run = ground.run_of(folder)
        flipped(PART, -9)(run / "checkpoints/step-00000010")
        return ["export", "run", *arguments]

    return make


def _status(folder: Path) -> Sequence[str]:
    _beside(ground.run_of(folder, 8) / "checkpoints/step-00000008")
    return ["status", "run"]


def _never(folder: Path) -> Sequence[str]:
    _lost_recipe(ground.run_of(folder, 8) / "checkpoints/step-00000008")
    return [*ground.pretrain(folder), "--resume_from_checkpoint", "never"]


SMALLER = {"bounds": {}, "shapes": {}}
ATTACKS = [
    set_aside("an empty folder of a step", _empty, "state.json is missing"),
    set_aside("a checkpoint that is a file", _as_a_file, "state.json is missing"),
    set_aside("a link to a checkpoint that is gone", _dangling, "state.json is missing"),
    set_aside("a part cut short", lambda c: os.truncate(c / PART, 5000), f"{PART} has 5,000 bytes, and "),
    set_aside("a part with bytes behind it", lambda c: os.truncate(c / PART, 10**7), f"{PART} has 10,000,000 bytes"),
    set_aside("a part that is missing", lambda c: (c / PART).unlink(), f"{PART} is missing"),
    set_aside("a part that is a pipe", lambda c: _replace(c / PART, os.mkfifo), f"{PART} is no regular file"),
    set_aside(
        "a part that is an endless device",
        lambda c: _replace(c / PART, lambda file: file.symlink_to("/dev/zero")),
        f"{PART} is no regular file",
    ),
    set_aside("a flipped bit in a part", flipped(PART, -1), f"{PART} is not as it was written, between its bytes 0"),
    set_aside("a flipped bit in a part's header", flipped(PART, 60), f"{PART} is not as it was written"),
    set_aside("a flipped bit that another process reads", flipped(PART, -1), f"{PART} is not as it was", world=2),
    set_aside("a part of the step before", _of_step_4(PART), f"{PART} is not as it was written"),
    set_aside("a part and the index of the step before", _of_step_4(PART, "index.json"), f"{PART} is not as it was"),
    set_aside("the state of the step before", _of_step_4("state.json"), "state.json is not as it was written"),
    set_aside("the step before under another name", _all_of_step_4, "state.json is of step 4"),
    set_aside("a state of step 999999", edited("state.json", step=999999), "state.json is not as it was written"),
    set_aside("an empty state", written("state.json", b""), "state.json is unreadable"),
    set_aside("a state of random bytes", written("state.json", bytes(range(256))), "state.json is unreadable"),
    set_aside("a state that is a list", written("state.json", b"[8]"), "state.json is unreadable"),
    set_aside("a state nested 100,000 deep", written("state.json", b"[" * 100_000), "state.json is unreadable"),
    set_aside("a state of 20 GiB", _huge, "state.json has 21,474,836,480 bytes"),
    set_aside("a flipped bit in the index", flipped("index.json", -3), "index.json is "),
    set_aside("an index of a shortened tensor", edited("index.json", **SMALLER), "index.json is not as it was written"),
    set_aside("a broken copy of the recipe", written("recipe.yaml", b"{a: ["), "recipe.yaml is not as it was written"),
    set_aside("a checkpoint of another run", _of_another_run, "it is of a run of another recipe: seed: 1, now 0"),
    set_aside("digests that are missing", lambda c: (c / "digests.json").unlink(), "digests.json is missing"),
    set_aside("digests of nothing", written("digests.json", b"{}"), "digests.json is unreadable"),
    set_aside("metrics ahead of the checkpoint taken, the last line torn", _torn_metrics, "state.json is missing"),
    Attack(
        "two damaged checkpoints, one of them of the last step",
        after(_both_newer, up_to=None),
        says=("step-00000010 is unusable", "step-00000008 is unusable", "goes on from step-00000004"),
        check=went_on_from(4, "step-00000010", "step-00000008"),
    ),
    Attack("a checkpoint set aside twice", after(_twice), says=("kept as bad-step-00000008.2",), check=_second_name),
    Attack(
        "no checkpoint is whole",
        after(_all_empty),
        code=2,
        says=("no checkpoint of", "step-00000008: state.json is missing", "step-00000004: ", "whole copy"),
        check=_as_it_was,
    ),
    Attack(
        "a checkpoint of a newer version",
        after(_of_a_newer_version),
        code=2,
        says=("has format 3, of flipscale 9.1", "install the version that wrote it"),
        check=_as_it_was,
    ),
    Attack("a checkpoint behind a link", after(_behind_a_link), check=_link_removed),
    Attack("names that are almost checkpoints', and leftovers", after(_beside), check=_kept_what_is_not_ours),
    Attack("checkpoints of a run whose recipe is lost", after(_lost_recipe), check=went_on_from(8)),
    Attack("the folder of checkpoints is a link to nothing", after(_folder_gone), code=1, says=("checkpoints'",)),
    Attack("the folder of checkpoints is a file", after(_folder_a_file), code=1, says=("checkpoints'",)),
    Attack("the run is not to be resumed, and its recipe is lost", _never, code=2, says=("'never'",)),
    Attack(
        "a damaged checkpoint to export",
        _export(),
        code=1,
        says=("step-00000010 is damaged", "name another one with --step"),
    ),
    Attack("an export of the one before", _export("--step", "8"), says=("export-8",)),
    Attack("an export of no step", _export("--step", "999"), code=2, says=("is no checkpoint; there are step-00",)),
    Attack("status of names that are almost checkpoints'", _status, says=("checkpoint",)),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
