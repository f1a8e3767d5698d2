"""`flipscale check`: recipes, flags, launch files and numbers of processes that can run, and those that cannot."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from flipscale.cli import main

VERBS = ("check", "pretrain --dry_run", "pretrain")


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
        ("--num_processes 2 --model.text_config.attention_dropout 0.1", ("attention_dropout is 0.1", "2 processes")),
        ("--optim.weight_deca 0.1", ("--optim.weight_deca ", "--optim.weight_decay?")),
        ("--launch_file none.yaml", ("none.yaml",)),
        ("--launch_file ds_configs/zero3.yaml --optim.name muon", ("optim.name", "adamw")),
        ("--launch_file ds_configs/hsdp.yaml --num_processes 24 --num_machines 4", ("dp_shard_size",)),
        (
            "--launch_file ds_configs/hsdp.yaml --num_processes 16 --num_machines 5",
            ("num_processes is 16", "5 machines"),
        ),
        ("--model.init_from runs/not/there", ("runs/not/there",)),
        ("--pending --model.family towers --model.vision runs/not/yet", ("model.family is 'towers'", "runs/not/yet")),
    ],
)
def test_what_cannot_run_is_refused(
    tmp_path: Path, write_recipe: Callable[..., Path], refused: Callable[..., str], words: str, named: tuple[str, ...]
) -> None:
    said = refused("check", "--config", write_recipe(tmp_path / "run"), *words.split())
    assert all(word in said for word in named), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--mask.kind grid --stages.0.mask_ratio 0.3", ("grid", "mask_ratio")),
        ("--mask.views 4 --stages.0.mask_ratio 0.5", ("4 views",)),
        ("--mask.views 2 --mask.kind centre", ("views is 2", "centre")),
        ("--stages.0.mask_ratio 0.999", ("0.999",)),
        ("--stages.0.text_mask_ratio 0.99", ("0.99",)),
        ("--hub.push_to_hub true --hub.hub_model_id name", ("'name'",)),
        ("--loss.kind captioning --eval.zero_shot tests", ("zero_shot", "loss.kind 'captioning'")),
        ("--loss.kind classify --loss.options.num_classes 16 --eval.retrieval tests", ("retrieval", "'classify'")),
        ("--eval.tasks '[{kind: captioning, data: tests}]'", ("captioning", "no decoder")),
        ("--eval.tasks '[{kind: zero_shot_memory, data: tests}]'", ("eval.tasks", "zero_shot_memory")),
        ("--eval.tasks '[{kind: retrieval, data: tests, image_size: 36}]'", ("eval.tasks", "36")),
        (
            "--loss.kind classify --loss.options.num_classes 16 --data.augment.rand_augment rnd-m9",
            ("data.augment.rand_augment is 'rnd-m9'",),
        ),
        ("--data.image_features stored", ("stages.masked.mask_ratio is 0.75", "data.image_features is 'stored'")),
        ("--log.report_to [tensorbord]", ("log.report_to has 'tensorbord'",)),
        ("--data.micro_batch_size 3", ("micro_batch_size 3",)),
        ("--model.frozen [vision_tower]", ("model.frozen", "vision_tower")),
        ("--optim.part_lr_ratios '{tower: 2}'", ("optim.part_lr_ratios", "'tower'")),
        (
            "--loss.kind captioning --data.micro_batch_size 8 --model.decoder_config.attention_dropout 0.2",
            ("decoder_config.attention_dropout is 0.2", "micro_batch_size 8"),
        ),
        ("--stages.0.warmup_samples 100000", ("'masked'", "100000 samples")),
        ("--stages.1.image_size 36", ("'unmasked'", "36")),
    ],
)
def test_a_start_refuses_the_same_fields(
    tmp_path: Path, write_recipe: Callable[..., Path], refused: Callable[..., str], caption_tokenizer: Path, words: str,
    named: tuple[str, ...],
) -> None:  # fmt: skip
    """The check, a dry run and a start print one sentence, before any data is opened."""
    file = write_recipe(tmp_path / "run", data={"shards": "nowhere", "tokenizer": str(caption_tokenizer)})
    said = {refused(*verb.split(), "--config", file, *shlex.split(words)) for verb in VERBS}
    assert len(said) == 1, said
    assert all(word in min(said) for word in named), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--data.tokenizer ./not/there", ("./not/there",)),
        (
            "--model.text_config.attend_to_padding false --data.pack_captions true --data.tokenizer {left}",
            ("data.pack_captions is true", "left"),
        ),
        ("--loss.kind captioning --model.decoder_config.bos_token_id 5 --data.tokenizer {ends}", ("bos_token_id", "5")),
        ("--loss.caption_weight 1", ("begin", "end")),
        ("--model.text_config.vocab_size 10", ("entries", "10")),
        ("--model.init_from {start}", ("model.init_from", "config.json")),
        ("--model.init_from {run} --data.tokenizer {other}", ("other", "'green'")),
        ("--model.init_from {run} --model.text_config.hidden_size 48", ("model.init_from", "48")),
        ("--hub.audit audit.json", ("hub.audit is 'audit.json'",)),
    ],
)
def test_a_start_refuses_the_same_files(
    tmp_path: Path, write_recipe: Callable[..., Path], refused: Callable[..., str], caption_tokenizer: Path,
    tokenizer_dir: Path, trained_run: Path, words: str, named: tuple[str, ...],
) -> None:  # fmt: skip
    """A dry run needs no files."""
    folders = {name: tmp_path / name for name in ("left", "other", "start")}
    for name, changes in (("left", {"padding_side": "left"}), ("other", {})):
        PreTrainedTokenizerFast.from_pretrained(tokenizer_dir, **changes).save_pretrained(folders[name])
    swapped = (folders["other"] / "tokenizer.json").read_text().replace('"red": 4', '"red": 5', 1)
    (folders["other"] / "tokenizer.json").write_text(swapped.replace('"green": 5', '"green": 4', 1))
    folders["start"].mkdir()
    (folders["start"] / "config.json").write_text("{")
    file = write_recipe(tmp_path / "run")
    flags = words.format(**folders, ends=caption_tokenizer, run=trained_run).split()
    said = {refused(verb, "--config", file, *flags) for verb in ("check", "pretrain")}
    assert len(said) == 1, said
    assert all(word in min(said) for word in named), said
