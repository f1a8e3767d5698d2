"""Pushes of a model folder over real HTTP: first, repeated, refused, resumed."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from hub.loopback_hub import TOKEN, LoopbackHub, Reply
from huggingface_hub import HfApi
from safetensors.numpy import save_file

from flipscale.cli import main
from flipscale.hub.push import Target, push_folder

WRITES = r"(POST|PUT|DELETE) (?!/api/validate-yaml|/api/repos/create|.*/preupload/|.*/branch/)"


def write_weights(folder: Path, seed: int, shards: int = 2) -> None:
    for old in folder.glob("*.safetensors"):
        old.unlink()
    names = [f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" for shard in range(shards)]
    for shard, name in enumerate(names):
        save_file({f"w{shard}": np.random.default_rng([seed, shard]).random(1000)}, folder / name)
    index = {"metadata": {}, "weight_map": {f"w{shard}": name for shard, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with a model of two shards in it."""
    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "flip"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    write_weights(folder, 0)
    return folder.parent


@pytest.mark.usefixtures("logged_in")
def test_the_first_and_second_push(hub: LoopbackHub, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["push", str(run_dir), "org/name", "--private"]
    main(command)
    first = capsys.readouterr()
    assert first.out.startswith(f"{hub.endpoint}/org/name: commit ")
    local = {path.name: path.read_bytes() for path in (run_dir / "model").iterdir()}
    assert hub.content("org/name") == local
    assert hub.repos["org/name"].private
    assert len(hub.asked("PUT /storage/")) == 2
    for request in hub.requests:  # the token is in the header alone
        rest = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert TOKEN not in request.path + str(rest)
        assert TOKEN.encode() not in request.body
    assert not any("authorization" in request.headers for request in hub.asked("PUT /storage/"))

    hub.requests.clear()
    main(command)
    again = capsys.readouterr()
    assert again.out == f"{hub.endpoint}/org/name: nothing new, nothing uploaded\n"
    assert [r for r in hub.asked(WRITES) if "objects/batch" not in r.path] == []
    assert TOKEN not in first.out + first.err + again.out + again.err


@pytest.mark.usefixtures("logged_in")
def test_weights_in_fewer_shards_replace_the_older(hub: LoopbackHub, run_dir: Path) -> None:
    target = Target("org/name")
    push_folder(run_dir / "model", target, "first")
    HfApi(endpoint=hub.endpoint).upload_file(path_or_fileobj=b"theirs", path_in_repo="notes.txt", repo_id="org/name")
    write_weights(run_dir / "model", 1, shards=1)
    assert push_folder(run_dir / "model", target, "second")[1]
    assert set(hub.content("org/name")) == {
        "config.json", "README.md", "notes.txt", "model-00001-of-00001.safetensors", "model.safetensors.index.json"
    }  # fmt: skip


@pytest.mark.usefixtures("logged_in")
def test_weights_of_two_formats_live_in_one_repository(hub: LoopbackHub, run_dir: Path, tmp_path: Path) -> None:
    target, other = Target("org/name"), tmp_path / "other"
    push_folder(run_dir / "model", target, "first")
    before = set(hub.content("org/name"))
    other.mkdir()
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        (other / name).write_bytes(b"{}")
    push_folder(other, target, "second")
    push_folder(run_dir / "model", target, "third")
    assert set(hub.content("org/name")) == before | {"open_clip_model.safetensors", "open_clip_config.json"}


@pytest.mark.usefixtures("logged_in")
def test_a_card_without_a_run_gets_the_hub_name(hub: LoopbackHub, run_dir: Path) -> None:
    card = 'pipeline(model="{0}"); get_tokenizer("local-dir:{0}"); from_pretrained("org/b")  # of "{1}s"\n'
    for number, place in enumerate((f"{run_dir}/model", "runs/mine/model")):
        (run_dir / "model/README.md").write_text(card.format(place, place))
        main(["push", str(run_dir), f"org/name{number}"])
        expected = card.format(f"org/name{number}", place).replace("local-dir:", "hf-hub:")
        assert hub.content(f"org/name{number}")["README.md"].decode() == expected


@pytest.mark.usefixtures("logged_in")
def test_the_model_folder_of_a_run_gets_the_run_s_card(
    hub: LoopbackHub, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "recipe.yaml").touch()
    runs = list[Path]()
    monkeypatch.setattr("flipscale.hub.card.write_card", lambda folder, run, *_: runs.append(run))
    main(["push", str(run_dir / "model"), "org/name"])
    assert runs == [run_dir]


@pytest.mark.usefixtures("logged_in")
def test_a_revision_is_a_branch(hub: LoopbackHub, run_dir: Path) -> None:
    main(["push", str(run_dir), "org/name"])
    before = hub.content("org/name")
    write_weights(run_dir / "model", 7)
    for _ in range(2):
        main(["push", str(run_dir / "model"), "org/name", "--revision", "v2"])
    assert hub.content("org/name") == before
    assert (
        hub.content("org/name", "v2")["model-00001-of-00002.safetensors"] != before["model-00001-of-00002.safetensors"]
    )


@pytest.mark.usefixtures("logged_in")
def test_transient_errors_are_retried(
    hub: LoopbackHub, run_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fail_next(1, "repos/create")
    hub.fail_next(1, "/commit/", status=500, message=f"you sent {TOKEN}")
    assert push_folder(run_dir / "model", Target("org/name"), "m", waits=(0.01, 0.01))[1]
    retries = [line for line in caplog.messages if "trying again in 0.01 s" in line]
    assert ["out of order" in retries[0], "you sent <token>" in retries[1], len(retries)] == [True, True, 2]
    hub.fail_next(9, "repos/create")
    hub.requests.clear()
    with pytest.raises(OSError, match=r"org/name failed \(out of order\)"):
        push_folder(run_dir / "model", Target("org/name"), "m", waits=(0.01,))
    assert len(hub.asked("repos/create")) == 2
    with monkeypatch.context() as patch:
        patch.setattr(hub, "answer", lambda request: Reply(body=b"<html>log in first</html>"))
        with pytest.raises(OSError, match="does not answer as the Hub does"):
            push_folder(run_dir / "model", Target("org/name"), "m", waits=())
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"org/name failed \(.*[Cc]onnect"):
        push_folder(run_dir / "model", Target("org/name"), "m", waits=())


@pytest.mark.usefixtures("logged_in")
def test_an_interrupted_upload_resumes(hub: LoopbackHub, run_dir: Path) -> None:
    hub.fail_next(1, "PUT /storage/", status=403, message="cut off")
    with pytest.raises(ValueError, match="cut off"):
        push_folder(run_dir / "model", Target("org/name"), "m")
    (arrived,) = hub.blobs
    hub.requests.clear()
    push_folder(run_dir / "model", Target("org/name"), "m")
    (sent,) = [request.path.rsplit("/")[-1] for request in hub.asked("PUT /storage/")]
    assert arrived != sent


@pytest.mark.usefixtures("logged_in")
def test_mistakes(
    hub: LoopbackHub, run_dir: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "the token may not write to nowhere/name" in refused("push", run_dir, "nowhere/name")
    assert "'a/b/c' is not a valid model name" in refused("push", run_dir, "a/b/c")
    assert "'name' has no account" in refused("push", run_dir, "name")
    hub.add("org/public", {})
    assert "org/public is public" in refused("push", run_dir, "org/public", "--private")
    assert hub.content("org/public") == {}
    assert f"{run_dir.parent} has no model to push" in refused("push", run_dir.parent, "org/name")
    (run_dir / "model/README.md").write_text("---\nlicense: [3]\n---\n")
    assert '"license" must be a string' in refused("push", run_dir, "org/name")
    (run_dir / "model/README.md").unlink()

    monkeypatch.setenv("HF_TOKEN", "hf_another")
    line = refused("push", run_dir, "org/name")
    assert "the Hub rejects the token for org/name" in line
    assert "hf_another" not in line
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    assert "no token to push to org/name" in refused("push", run_dir, "org/name")
    assert hub.requests == []


def test_a_dry_run_needs_no_network(
    hub: LoopbackHub, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (run_dir / "model/.cache").mkdir()
    monkeypatch.setattr("socket.socket.connect", None)
    monkeypatch.chdir(run_dir)
    main(["push", ".", "org/name", "--revision", "v2", "--dry_run"])
    *files, others, last = capsys.readouterr().out.splitlines()
    sizes = {path.name: path.stat().st_size for path in (run_dir / "model").iterdir() if path.is_file()}
    assert [line.split() for line in files] == [[f"{size:,}", name] for name, size in sorted(sizes.items())]
    assert others.endswith(": .cache")
    assert "5 files of run would go to org/name (revision v2)" in last


@pytest.mark.usefixtures("logged_in")
def test_other_files_and_links_stay(
    hub: LoopbackHub, run_dir: Path, capsys: pytest.CaptureFixture, refused: Callable[..., str]
) -> None:
    model, secret = run_dir / "model", run_dir / "secret"
    written = {path.name for path in model.iterdir()}
    secrets = (".env", "id_rsa", "README.md~", ".README.md.swp", "notes.txt", "train.py", "model.pt", "#config.json#")
    for name in secrets:
        (model / name).write_text("a secret")
    for folder in (secret, *(model / name for name in (".git", "checkpoints", "model.safetensors.d"))):
        folder.mkdir()
        (folder / "config.json").write_text("a secret")
    (secret / "loss.png").write_text("a secret")
    (model / "link.json").symlink_to("/etc/passwd")
    (model / "results.jsonl").symlink_to(secret / "loss.png")
    (model / "visual").symlink_to(secret)
    (model / "figures").mkdir()
    (model / "figures/*.png").write_text("a name that is a pattern")
    (model / "figures/loss.png").symlink_to(secret / "loss.png")
    os.mkfifo(model / "pipe")
    main(["push", str(run_dir), "org/name"])
    assert set(hub.content("org/name")) == written | {"figures/*.png"}
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert "#config.json#, .README.md.swp, .env, .git, README.md~, checkpoints and 10 more" in told
    weights = model / "model-00002-of-00002.safetensors"
    weights.rename(model / "there")
    weights.symlink_to(model / "there")
    assert f"{weights} is a link" in refused("push", run_dir, "org/name")
