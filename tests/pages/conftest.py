"""A finished run whose test set has names that somebody chose to do harm."""

import tarfile
from pathlib import Path

import pytest
import yaml
from conftest import add_member, write_shards

from flipscale import cli

HOSTILE = (
    "<script>document.title = 'taken'</script>",
    '"><img src=x onerror="document.title=\'taken\'">',
    "{{ 7 * 7 }} {% raw %}",
    "\u202eerom dna txet \u0000 & \u2028 'quotes' </td></table>",
    "word " * 200,
)


@pytest.fixture(scope="session")
def trained(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two evaluations, whose test set has hostile names and captions."""
    folder = tmp_path_factory.mktemp("pages")
    write_shards(folder / "test", [40])
    names = folder / "test/classnames.txt"
    lines = names.read_text().splitlines()
    lines[: len(HOSTILE)] = [" ".join(name.replace("\u2028", " ").split()) for name in HOSTILE]
    names.write_text("\n".join(lines))
    (folder / "captions").mkdir()
    with tarfile.open(folder / "test/00000.tar") as read, tarfile.open(folder / "captions/0.tar", "w") as written:
        for number, member in enumerate(read):
            content = read.extractfile(member).read()
            if member.name.endswith(".txt"):
                content = HOSTILE[number % len(HOSTILE)].encode()
            if not member.name.endswith(".cls"):
                add_member(written, member.name, content)
    stages = [
        {"name": "masked", "samples": 64, "mask_ratio": 0.75, "base_lr": 0.012},
        {"name": "whole </table>", "samples": 32, "base_lr": 0.006},
    ]
    evaluation = {"every_samples": 48, "zero_shot": str(folder / "test"), "retrieval": str(folder / "test")}
    changed = {**recipe, "stages": stages, "eval": {**evaluation, "num_workers": 0}, "output_dir": str(folder / "run")}
    (folder / "run.yaml").write_text(yaml.safe_dump(changed))
    cli.main(["pretrain", "--config", str(folder / "run.yaml")])
    return folder / "run"
