"""Pushes while training: the loop never waits, a failure never ends the run, and the finished model arrives."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import draw, launch, metrics
from hub.loopback_hub import TOKEN, LoopbackHub
from processes import wait_for

from flipscale.cli import main
from flipscale.hub.push import BackgroundPush, open_target
from flipscale.recipe.outputs import HubRecipe
from flipscale.recipe.recipe import Recipe

HUB = {"push_to_hub": True, "hub_model_id": "org/name"}

# Runs the card's snippets without flipscale, then loads two revisions with it.
LOAD = """
import sys
sys.modules["flipscale"] = None
exec(open("snippets.py").read())
model = model[0].model  # the last snippet's is a SentenceTransformer
assert type(model).__module__.startswith("transformers_modules.")
del sys.modules["flipscale"]
import torch
from flipscale.model import FlipModel
first, last = (FlipModel.from_pretrained("org/name", revision=revision) for revision in ("before", "main"))
assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), last.parameters()))
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), last.parameters()))
half = FlipModel.from_pretrained("org/name", variant="bf16", dtype=torch.bfloat16)
assert all(torch.equal(a, b.bfloat16()) for a, b in zip(half.parameters(), last.parameters()))
"""


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.long
def test_saves_arrive_while_the_run_goes_on(
    hub: LoopbackHub, hub_environment: dict[str, str], write_recipe, tmp_path: Path
) -> None:
    hub.fail_next(2, "/commit/")
    stages = [{"name": "long", "samples": 1_600_000, "mask_ratio": 0.75, "base_lr": 0.012}]
    file = write_recipe(tmp_path / "run", stages=stages, save={"every_samples": 1600, "total_limit": 10_000}, hub=HUB)
    command = [sys.executable, "-m", "flipscale.pretrain", "--config", str(file)]
    environment = {**os.environ, **hub_environment, "OMP_NUM_THREADS": "1"}
    # A pipe without a reader would fill up.
    with open(tmp_path / "told", "w") as stderr:
        run = subprocess.Popen(command, env=environment, stderr=stderr)
    try:
        wait_for(lambda: "org/name" in hub.repos and bool(hub.content("org/name")), 900)
        seen = metrics(tmp_path / "run")[-1]["step"]
        wait_for(lambda: metrics(tmp_path / "run")[-1]["step"] > seen, 900)
        assert run.poll() is None
    finally:
        run.send_signal(signal.SIGTERM)
        run.wait(60)
    told = (tmp_path / "told").read_text()
    log = (tmp_path / "run/push.log").read_text()
    assert run.returncode == 0, told
    assert len(hub.asked("/commit/")) >= 3
    assert {"config.json", "model.safetensors", "README.md", "processor_config.json"} <= set(hub.content("org/name"))
    assert log.count("trying again in") == 2, log
    assert not (tmp_path / "run/DONE").exists()
    assert not list((tmp_path / "run").glob(".push*"))
    assert not files_with(TOKEN, tmp_path / "run")
    assert TOKEN not in told


@pytest.mark.long
@pytest.mark.usefixtures("logged_in")
def test_the_finished_model_arrives_and_loads(
    hub: LoopbackHub, hub_environment: dict[str, str], write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    for name, value in hub_environment.items():
        monkeypatch.setenv(name, value)
    run_dir = tmp_path / "run"
    file = write_recipe(run_dir, hub=HUB, save={"every_samples": 384})
    hub.fail_next(9, "/commit/", status=403, message="no space left in org")
    # New interpreters: the Hub's client reads its environment when it is imported.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = launch([*torchrun, "-m", "flipscale.pretrain", "--config", str(file)], **hub_environment)
    assert done.returncode == 1
    assert (run_dir / "DONE").exists()
    line = next(line for line in done.stderr.splitlines() if "flipscale: error:" in line)
    assert f"{run_dir} is done, but its model is not on the Hub: the token may not write to org/name" in line
    assert line.endswith(f"push it by hand: flipscale push {run_dir} org/name")
    hub._faults.clear()

    main(["push", str(run_dir), "org/name", "--step", "24", "--revision", "before"])
    # The same command as before: the run is done, what is missing is the push. A page that fails does not prevent it.
    (run_dir / "report.html").unlink()
    (run_dir / "environment.json").write_text('{"num_parameters": ["x"]}')
    main(["pretrain", "--config", str(file)])
    told = capsys.readouterr()
    assert f"{run_dir} is on the Hub: {hub.endpoint}/org/name" in told.out
    assert not (run_dir / "report.html").exists()
    local = run_dir / "model"
    sent = {str(path.relative_to(local)): path.read_bytes() for path in local.rglob("*") if path.is_file()}
    assert hub.content("org/name") == sent
    card = hub.content("org/name")["README.md"].decode()
    (tmp_path / "snippets.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL)))
    cv2.imwrite(str(tmp_path / "image.png"), draw("red", "disc", np.random.default_rng(0)))
    loaded = launch([sys.executable, "-c", LOAD], cwd=tmp_path, **hub_environment)
    assert loaded.returncode == 0, loaded.stderr
    # The scores, then the cosines, which transformers and sentence-transformers give alike.
    told_scores = re.fullmatch(r"\[\{'score': [\d.]+, 'label': .*\}\]\n(tensor\(\[\[.*\]\]\)\n)\1", loaded.stdout)
    assert told_scores, loaded.stdout
    assert not files_with(TOKEN, tmp_path)
    assert TOKEN not in done.stderr + done.stdout + told.out + told.err


def test_one_push_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pushes, begin = dict[int, subprocess.Popen[bytes]](), subprocess.Popen

    def start(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        step = int(command[-1])
        if step == 50:
            raise OSError("no memory")
        script = f"cat; echo 'flipscale: error: no way to push {step}' >> {tmp_path}/push.log; exit {step % 20}"
        pushes[step] = begin(["sh", "-c", script], stdin=subprocess.PIPE)  # ends when its input does
        return pushes[step]

    monkeypatch.setattr(subprocess, "Popen", start)
    push = BackgroundPush(Recipe(hub=HubRecipe(**HUB), output_dir=str(tmp_path)), last_step=90, is_main_process=True)
    push.offer(10)
    push.offer(20)
    assert list(pushes) == [10]
    pushes[10].communicate()
    push.offer(40)
    pushes[40].communicate()
    for step in (50, 60, 90):
        push.offer(step)
    push.close()
    assert list(pushes) == [10, 40, 60]
    assert pushes[60].poll() == -signal.SIGTERM
    pushes[60].stdin.close()
    reasons = [(message.split()[1], message.split("(")[1].split(")")[0]) for message in caplog.messages]
    assert reasons == [("10", "no way to push 10"), ("50", "no memory")]


@pytest.mark.parametrize(("fields", "message"), [
    ({"hub_model_id": None}, "hub.hub_model_id is not set"),
    ({"hub_model_id": "a/b/c"}, "'a/b/c' is not a valid model name"),
    ({"hub_model_id": "nowhere/name"}, "the token may not write to nowhere/name"),
])  # fmt: skip
@pytest.mark.usefixtures("logged_in")
def test_a_bad_target_is_an_error_at_the_start(
    hub: LoopbackHub, write_recipe, tmp_path: Path, refused: Callable[..., str], fields: dict, message: str
) -> None:
    assert message in refused("pretrain", "--config", write_recipe(tmp_path / "run", hub={**HUB, **fields}))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("logged_in")
def test_a_run_starts_without_the_hub(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = HubRecipe(**HUB)
    hub.fail_next(1, "repos/create")
    open_target(recipe, resumes=False)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    open_target(recipe, resumes=True)
    assert [line.split("; ")[-1] for line in caplog.messages] == [
        "the run continues and will push its next checkpoint"
    ] * 2
    monkeypatch.setenv("RANK", "1")
    hub.requests.clear()
    open_target(recipe, resumes=False)
    assert hub.requests == []
