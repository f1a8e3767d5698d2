"""docs/your_pictures.md from top to bottom: its commands and its Python on 300 drawings, with a short training."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from cli.own_pictures import lay_out
from cli.pages import ROOT, commands
from cli.test_pages import ends_well, run
from hub.conftest import hub, logged_in  # noqa: F401 (fixtures)

from flipscale import cli

PAGE = ROOT / "docs/your_pictures.md"


@pytest.mark.long
def test_the_page_from_top_to_bottom(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged_in: None,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    lay_out(tmp_path)
    printed: dict[str, str] = {}
    for command in commands(PAGE):
        if re.match(r"flipscale prepare shards$", command.text):
            continue
        with ends_well(command.text, capsys):
            if command.text.startswith("flipscale pretrain"):
                # Elsewhere, pages only have it print the recipe.
                cli.main(shlex.split(command.text.replace("--budget_minutes 5", "--budget_minutes 0.05"))[1:])
            else:
                run(command, is_real=True)
        printed[command.text] = capsys.readouterr().out
    layouts = {text.split()[3]: out.splitlines()[0] for text, out in printed.items() if "prepare shards" in text}
    (shown,) = re.findall(r"\n\n```\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    assert shown == layouts["pictures"], "the page shows another line"
    assert list(layouts) == ["pictures", "with_texts", "with_table", "list.csv", "list.jsonl", "list.parquet", "saved"]
    assert all(line.startswith("300 ") for line in layouts.values())
    results = [json.loads(line) for line in Path("runs/mine/results.jsonl").read_text().splitlines()]
    assert {result["kind"] for result in results} >= {"zero_shot", "retrieval"}
    for file in ("sheet.png", "runs/mine/report.html", "search.html", "mine-onnx/image_model.onnx", "large.yaml"):
        assert Path(file).is_file(), file
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(snippet, "docs/your_pictures.md", "exec"), {})
    guesses = capsys.readouterr().out
    assert "sport" in guesses
    assert "clothing" in guesses
