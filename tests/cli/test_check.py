"""`flipscale check`: recipes, flags, launch files and numbers of processes that can run, and those that cannot."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flipscale.cli import main


def test_what_can_run_is_a_line_each(
    tmp_path: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither data nor start weights of a job before this one need to be there, and nothing is written."""
    recipes = [write_recipe(tmp_path / name, data={"shards": "nowhere"}) for name in ("one", "two")]
    main(["check", "--config", *map(str, recipes), "--num_processes", "4", "--seed", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*map(str, recipes)]
    assert all(" 4 processes " in line for line in lines)
    main(["check", "--config", str(recipes[0]), "--budget_minutes", "1"])  # of a recipe of samples
    main(["check", "--pending", "--config", str(recipes[0]), "--model.init_from", "runs/not/yet"])
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--num_processes 3", ("global_batch_size 16", "3 processes")),
        ("--optim.weight_deca 0.1", ("--optim.weight_deca ", "--optim.weight_decay?")),
        ("--launch_file none.yaml", ("none.yaml",)),
        ("--launch_file ds_configs/zero3.yaml --optim.name muon", ("optim.name", "adamw")),
        ("--launch_file ds_configs/hsdp.yaml --num_processes 24 --num_machines 4", ("dp_shard_size",)),
        (
            "--launch_file ds_configs/hsdp.yaml --num_processes 16 --num_machines 5",
            ("num_processes is 16", "5 machines"),
        ),
        ("--data.micro_batch_size 3", ("micro_batch_size 3",)),
        ("--model.init_from runs/not/there", ("runs/not/there",)),
        ("--mask.kind grid --stages.0.mask_ratio 0.3", ("grid", "mask_ratio")),
        ("--mask.views 4 --stages.0.mask_ratio 0.5", ("4 views",)),
        ("--mask.views 2 --mask.kind centre", ("views is 2", "centre")),
        ("--stages.0.mask_ratio 0.999", ("0.999",)),
        ("--stages.0.text_mask_ratio 0.99", ("0.99",)),
        ("--data.weights w --data.fraction 0.5", ("data.fraction is 0.5", "data.weights is 'w'")),
        ("--hub.push_to_hub true", ("hub.hub_model_id",)),
        ("--data.tokenizer ./not/there", ("./not/there",)),
        ("--data.sources [{shards:a},{weight:2}]", ("data.",)),
        ("--model.frozen [vision_tower]", ("model.frozen", "vision_tower")),
    ],
)
def test_what_cannot_run_is_refused(
    tmp_path: Path, write_recipe: Callable[..., Path], refused: Callable[..., str], words: str, named: tuple[str, ...]
) -> None:
    said = refused("check", "--config", write_recipe(tmp_path / "run"), *words.split())
    assert all(word in said for word in named), said
    assert not (tmp_path / "run").exists()
