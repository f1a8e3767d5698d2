"""Attacks by a server in the Hub's place: what it answers when a model, a tokenizer or a test set is asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest
from attacks import bad_hub, ground
from attacks.attack import Attack, Ended, hold
from attacks.test_runs import obeys_nothing

SECRET = "hf_thatNobodyMaySee"


def _evaluated(folder: Path) -> list[str]:
    ground.shards(folder)
    ground.trained_model()
    return ["evaluate", "org/name", "--zero_shot", "data", "--num_workers", "0"]


def _pushed(folder: Path) -> list[str]:
    ground.model(folder)
    return ["push", "model", "org/name"]


def _downloaded(folder: Path) -> list[str]:
    return ["prepare", "tasks", "tasks", "--only", "cifar10"]


def _tokenized(folder: Path) -> list[str]:
    ground.shards(folder)
    ground.trained_model()
    return ground.pretrain(folder, data={"tokenizer": "org/name"})


def _wrote_nothing_outside(folder: Path, ended: Ended) -> None:
    assert SECRET not in ended.stdout + ended.stderr
    obeys_nothing(folder, ended)
    made = {path.name for path in folder.iterdir()} - {"data", "model", "recipe.yaml", "tasks"}
    assert made <= {"home"}, made
    assert {path.name for path in (folder / "home").glob("*")} <= {"hub", "xet", "token", "stored_tokens"}


def _hub(name: str, way: str, command: Callable[[Path], list[str]], code: int, *says: str) -> Attack:
    environment = {
        "HF_ENDPOINT": bad_hub.endpoint(way),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": "home",
        "HF_TOKEN": SECRET,
    }
    return Attack(name, command, code, says, _wrote_nothing_outside, environment=environment)


NONE = "the Hub has none that may be read"
AWAY = "'org/name' cannot be fetched"
NO_HUB = "answers is no Hub's"
ATTACKS = [
    _hub("a model that needs a login", "401", _evaluated, 2, NONE),
    _hub("a model of somebody else's", "403", _evaluated, 2, NONE),
    _hub("a model that is not there", "404", _evaluated, 2, NONE),
    _hub("a refusal in colours", "colours", _evaluated, 2, NONE),
    _hub("a server that is out of order", "500", _evaluated, 1, AWAY, "out of order"),
    _hub("a server that is busy for years", "busy", _evaluated, 1, AWAY, "asks to come back in 99999999999 s"),
    _hub("a server that has a limit a day", "limited", _evaluated, 1, AWAY, "asks to come back in 86400 s"),
    _hub("a login page for a model", "page", _evaluated, 1, AWAY, NO_HUB),
    _hub("a server that leads in a circle", "circle", _evaluated, 1, AWAY, "redirects"),
    _hub("a server that leads to a file", "elsewhere", _evaluated, 1, AWAY),
    _hub("an answer that is cut short", "short", _evaluated, 1, AWAY),
    _hub("an answer nested 100,000 deep", "deep", _evaluated, 1, AWAY, NO_HUB),
    _hub("an answer of null", "null", _evaluated, 1, AWAY, NO_HUB),
    _hub("an answer that unpacks to 50 MB", "zipped", _evaluated, 1, AWAY, NO_HUB),
    _hub("an answer that does not unpack", "not zipped", _evaluated, 1, AWAY),
    _hub("a model without a commit", "no commit", _evaluated, 1, AWAY, NO_HUB),
    _hub("a commit that leads out", "leads out", _evaluated, 1, AWAY, "the commit '../../../../out'"),
    _hub("a file's commit that leads out", "a commit of a file that leads out", _evaluated, 1, AWAY, "the commit"),
    _hub("a file's tag that leads out", "a tag that leads out", _evaluated, 1, AWAY, "the file tag"),
    _hub("a tokenizer's tag that leads out", "a tag that leads out", _tokenized, 2, "data.tokenizer 'org/name'"),
    _hub("a model without files", "no files", _evaluated, 2, "has no config.json"),
    _hub("files that lead out", "names that lead out", _evaluated, 2, "has no config.json"),
    _hub("files whose names are in colours", "a name in colours", _evaluated, 2, "has no config.json"),
    _hub("weights that are cut short", "cut", _evaluated, 1, AWAY),
    _hub("a login page for a file of a model", "a page for a file", _evaluated, 2, "config.json is damaged"),
    _hub("a file of a model that nobody may read", "a file for nobody", _evaluated, 2, NONE),
    _hub("a tokenizer of a server that is busy for years", "limited", _tokenized, 2, "data.tokenizer 'org/name'"),
    _hub("a login page for a tokenizer", "page", _tokenized, 2, "data.tokenizer 'org/name'"),
    _hub("a tokenizer that is not there", "404", _tokenized, 2, "data.tokenizer 'org/name'"),
    _hub("a test set that is not there", "404", _downloaded, 1, "cifar10"),
    _hub("a login page for a test set", "page", _downloaded, 1, "cifar10"),
    _hub("a push that the Hub refuses", "401", _pushed, 2, "the Hub rejects the token"),
    _hub("a push to a place of somebody else's", "403", _pushed, 2, "the token may not write to"),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
