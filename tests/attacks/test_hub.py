"""Attacks by a server in the Hub's place: its answers for a model, a tokenizer, a test set or a push."""

from pathlib import Path

from attacks import bad_hub, ground
from attacks.attack import Attack, Ended, Make, test_of
from attacks.changes import obeys_nothing

SECRET = "hf_thatNobodyMaySee"


def evaluated(folder: Path) -> list[str]:
    ground.shards(folder)
    ground.trained_model()
    return ["evaluate", "org/name", "--zero_shot", "data", "--num_workers", "0"]


def pushed(folder: Path) -> list[str]:
    ground.model(folder)
    return ["push", "model", "org/name"]


def downloaded(folder: Path) -> list[str]:
    return ["prepare", "tasks", "tasks", "--only", "cifar10"]


def tokenized(folder: Path) -> list[str]:
    ground.shards(folder)
    ground.trained_model()
    return ground.pretrain(folder, data={"tokenizer": "org/name"})


def writes_nothing_outside(folder: Path, ended: Ended) -> None:
    assert SECRET not in ended.stdout + ended.stderr
    obeys_nothing(folder, ended)
    made = {path.name for path in folder.iterdir()} - {"data", "model", "recipe.yaml", "tasks"}
    assert made <= {"home"}, made
    assert {path.name for path in (folder / "home").glob("*")} <= {"hub", "xet", "token", "stored_tokens"}


def hub(name: str, way: str, make: Make, code: int, *says: str) -> Attack:
    environment = {
        "HF_ENDPOINT": bad_hub.endpoint(way),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": "home",
        "HF_TOKEN": SECRET,
    }
    # Alone, because huggingface_hub reads the environment once.
    return Attack(name, make, code, says, writes_nothing_outside, environment=environment, alone=True)


MODEL = "org/name"
TOKENIZER = "data.tokenizer 'org/name'"
ATTACKS = [
    hub("a model that needs a login", "401", evaluated, 2, MODEL),
    hub("a model of somebody else's", "403", evaluated, 2, MODEL),
    hub("a model that is not there", "404", evaluated, 2, MODEL),
    hub("a refusal in colours", "colours", evaluated, 2, MODEL),
    hub("a server that is out of order", "500", evaluated, 1, MODEL, "out of order"),
    hub("a server that is busy for years", "busy", evaluated, 1, MODEL, "99999999999 s"),
    hub("a server that has a limit a day", "limited", evaluated, 1, MODEL, "86400 s"),
    hub("a login page for a model", "page", evaluated, 1, MODEL),
    hub("a server that leads in a circle", "circle", evaluated, 1, MODEL, "redirects"),
    hub("a server that leads to a file", "elsewhere", evaluated, 1, MODEL),
    hub("an answer that is cut short", "short", evaluated, 1, MODEL),
    hub("an answer nested 100,000 deep", "deep", evaluated, 1, MODEL),
    hub("an answer of null", "null", evaluated, 1, MODEL),
    hub("an answer that unpacks to 50 MB", "zipped", evaluated, 1, MODEL),
    hub("an answer that does not unpack", "not zipped", evaluated, 1, MODEL),
    hub("a model without a commit", "no commit", evaluated, 1, MODEL),
    hub("a commit that leads out", "leads out", evaluated, 1, MODEL, "'../../../../out'"),
    hub("a file's commit that leads out", "a commit of a file that leads out", evaluated, 1, MODEL, "../../out"),
    hub("a file's tag that leads out", "a tag that leads out", evaluated, 1, MODEL, "tag"),
    hub("a tokenizer's tag that leads out", "a tag that leads out", tokenized, 2, TOKENIZER),
    hub("a model without files", "no files", evaluated, 2, "config.json"),
    hub("files that lead out", "names that lead out", evaluated, 2, "config.json"),
    hub("files whose names are in colours", "a name in colours", evaluated, 2, "config.json"),
    hub("weights that are cut short", "cut", evaluated, 1, MODEL),
    hub("a login page for a file of a model", "a page for a file", evaluated, 2, "config.json"),
    hub("a file of a model that nobody may read", "a file for nobody", evaluated, 2, MODEL),
    hub("a tokenizer of a server that is busy for years", "limited", tokenized, 2, TOKENIZER),
    hub("a login page for a tokenizer", "page", tokenized, 2, TOKENIZER),
    hub("a tokenizer that is not there", "404", tokenized, 2, TOKENIZER),
    hub("a test set that is not there", "404", downloaded, 1, "cifar10"),
    hub("a login page for a test set", "page", downloaded, 1, "cifar10"),
    hub("a push that the Hub refuses", "401", pushed, 2, "token"),
    hub("a push to a place of somebody else's", "403", pushed, 2, "token"),
]

test_attack = test_of(ATTACKS)
