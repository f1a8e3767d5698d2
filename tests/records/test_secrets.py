"""Passwords and signed queries of URLs reach the server alone: neither a file of a run nor a line that is printed."""

import base64
import http.server
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from conftest import write_shards
from data.sources.test_remote_servers import plainly, server

from flipscale.cli import main
from flipscale.data.sources import remote

PASSWORD, TOKEN = "p%40ss-w0rd", "s3cret/T0ken%3D"
# Parts of them that no percent encoding, quoting or line break changes.
SECRET = re.compile("ss-w0rd|w0rd|s3cret|T0ken")


@pytest.fixture
def answers() -> dict[str, int]:
    """HTTP errors with which the server answers, by the end of a file's name."""
    return {}


@pytest.fixture
def url(tmp_path: Path, answers: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of two shards on a server that asks for a user, a password and a token."""
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(remote, "_TRIES", 2)
    write_shards(tmp_path / "served", [30, 17])
    spoiled = (tmp_path / "served/00000.tar").read_bytes().replace(b"JFIF", b"\0\0\0\0", 1)
    cut = spoiled.index(b"\xff\xd8\xff")
    (tmp_path / "served/00000.tar").write_bytes(spoiled[:cut] + bytes(8) + spoiled[cut + 8 :])
    os.truncate(tmp_path / "served/00001.tar", 20_000)
    wanted = "Basic " + base64.b64encode(b"user:p@ss-w0rd").decode()

    def answer(handler: http.server.BaseHTTPRequestHandler, content: bytes | None) -> None:
        handler.path, _, query = handler.path.partition("?")
        error = next((code for end, code in answers.items() if handler.path.endswith(end)), None)
        if handler.headers.get("Authorization") != wanted:
            error = 401
        elif not query.startswith("token=s3cret"):
            error = 403
        if error not in (None, 200):
            return handler.send_error(error)
        file = tmp_path / "served" / handler.path.lstrip("/")
        return plainly(handler, file.read_bytes() if file.is_file() else None)

    with server(tmp_path / "served", answer) as address:
        host = address.removeprefix("http://")
        yield f"http://user:{PASSWORD}@{host}/{{00000..00001}}.tar?token={TOKEN}"


def shown_files(folder: Path) -> list[str]:
    """The files of a folder that show a secret, in their names too."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [str(file) for file in files if SECRET.search(file.name + file.read_bytes().decode("latin-1"))]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command; returns what it printed, after a check that it has no secret."""

    def run(*words: object) -> str:
        words = tuple(map(str, words))
        for name in ("argv", "orig_argv"):
            monkeypatch.setattr(sys, name, ["python", "-m", "flipscale.cli", *words])
        capfd.readouterr()
        with suppress(SystemExit):
            main(list(words))
        printed = "".join(capfd.readouterr())
        assert not SECRET.search(printed), printed
        return printed

    return run


@pytest.mark.long
def test_a_run_and_what_is_made_of_it(
    url: str, run: Callable[..., str], write_recipe: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The first start names the URL by a flag; the second, with another token, by its recipe. Both read one cache."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run_dir, cache = tmp_path / "run", tmp_path / "cache"
    stages = [{"name": "masked", "samples": 64, "mask_ratio": 0.5, "base_lr": 0.01}]
    data = {"shards": None, "cache_dir": str(cache), "lanes": 1, "num_workers": 1, "max_bad_fraction": 0.9}
    file = write_recipe(run_dir, stages=stages, data=data, log={"report_to": ["tensorboard"]})
    sources = f"[{{shards: '{url}', weight: 2}}, {{shards: '{url}', weight: 1}}]"
    run("pretrain", "--config", file, f"--data.sources={sources}")
    assert (run_dir / "DONE").exists()
    shards = "http://***@" + url.partition("?")[0].rpartition("@")[2]
    assert shards in json.loads((run_dir / "environment.json").read_text())["command"]
    assert yaml.safe_load((run_dir / "recipe.yaml").read_text())["data"]["sources"][0]["shards"] == shards
    assert shards.replace("{00000..00001}", "00001") in (run_dir / "bad_samples.jsonl").read_text()
    stages.append({"name": "more", "samples": 32, "base_lr": 0.01})
    data["sources"] = [{"shards": url, "weight": 2}, {"shards": f"{url}2", "weight": 1}]
    file = write_recipe(run_dir, stages=stages, data=data, log={"report_to": ["tensorboard"]})
    assert "from step 4 of 6" in run("pretrain", "--config", file)
    assert len(list(cache.glob("[!.]*.tar"))) == 2
    run("status", run_dir)
    run("prepare", "inspect", url, "--sheet", tmp_path / "sheet.png")
    run("prepare", "embed", url, tmp_path / "features", "--model", run_dir)
    run("prepare", "weights", url, tmp_path / "weights", "--caption_counts")
    file.unlink()
    assert shown_files(tmp_path) == []
    words = ("--config", run_dir / "recipe.yaml", "--output_dir", tmp_path / "new")
    assert "lacks its password" in run("pretrain", *words)


@pytest.mark.parametrize("code", [401, 403, 500])
def test_errors_of_the_server(
    url: str, answers: dict[str, int], run: Callable[..., str], trained_run: Path, tmp_path: Path,
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, code: int,
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = write_recipe(tmp_path / "run", data={"shards": None})
    for answers[".tar"] in (code, 200):
        for words in (
            ("prepare", "inspect", url, "--sheet", tmp_path / "sheet.png"),
            ("prepare", "index", url),
            ("evaluate", trained_run, "--retrieval", url),
        ):
            assert "http://***@" in run(*words)
    answers[".tar"] = code
    assert "http://***@" in run("pretrain", "--config", file, "--data.shards", url)
    assert shown_files(tmp_path) == []


def test_warnings_of_retries(url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError(f"broken: URL('{url}')")

    with pytest.raises(OSError, match="could not be fetched in 2 tries") as error:
        remote.with_retries(url, fail)
    assert "http://***@" in caplog.text
    assert not SECRET.search(caplog.text + str(error.value))


def test_a_password_in_the_address_of_a_bucket_is_refused(run: Callable[..., str], tmp_path: Path) -> None:
    assert "'s3://***@bucket/" in run("prepare", "inspect", "s3://KEY:s3cret/w0rd@bucket/{00000..00001}.tar")
