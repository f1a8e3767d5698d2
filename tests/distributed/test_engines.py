"""Every engine learns what one process does, and goes on from what any other wrote."""

import hashlib
import json
import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from conftest import changed_recipe, cut, losses, metrics
from distributed.crowd import Crowds
from safetensors.torch import load_file
from transformers import AutoModel

from flipscale.cli import main
from flipscale.engines.checkpoint import CheckpointReader, latest_checkpoint
from flipscale.model import FlipForConditionalGeneration

long = partial(pytest.param, marks=pytest.mark.long)
MATRIX = [("ddp", 2), ("fsdp2", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("hsdp", 4), long("fsdp2", 4)]
STAGES = [
    {"name": "masked", "samples": 160, "mask_ratio": 0.75, "base_lr": 0.012, "warmup_samples": 64},
    {"name": "unmasked", "samples": 160, "base_lr": 0.006},
]


def norms(run_dir: Path) -> list[float]:
    """Those of each loss's gradient with respect to the image tower's tokens, of the first process's samples."""
    names = ("contrastive_grad_norm", "caption_grad_norm")
    return [record[name] for record in metrics(run_dir) for name in names if name in record]


def close(ours: list[float], theirs: list[float]) -> bool:
    return len(ours) == len(theirs) and max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-5


def assert_learned_alike(one: Path, many: Path, fall: float, num_steps: int = 20) -> None:
    assert len(losses(one)) == num_steps
    assert losses(one)[-1] < losses(one)[0] - fall, "nothing was learned, so equality means little"
    assert close(losses(one), losses(many))


def reader(run_dir: Path) -> CheckpointReader:
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    return CheckpointReader(checkpoint)


class Trainings:
    """Runs of 20 steps of one recipe, 10 masked and 10 not, saved every fifth step; each made once."""

    def __init__(self, folder: Path, recipe: dict, crowds: Crowds):
        self.recipe = {**recipe, "stages": STAGES, "save": {"every_samples": 80, "total_limit": 20}}
        self.folder, self.crowd = folder, crowds

    def file(self, run_dir: Path, **changes: object) -> Path:
        file = self.folder / f"{run_dir.name}.yaml"
        file.write_text(yaml.safe_dump(changed_recipe({**self.recipe, "output_dir": str(run_dir)}, changes)))
        return file

    def resume(self, run_dir: Path, step: int, engine: str, world: int, **changes: object) -> Path:
        """Return the directory of a copy that an engine resumed after a step."""
        copy = self.folder / f"{run_dir.name}-{step}-{engine}-{world}"
        cut(run_dir, copy, step)
        assert self.crowd(world).run("train", engine, self.file(copy, **changes)) == ["done"] * world
        return copy

    def assert_resumed_alike(self, run_dir: Path, step: int, engine: str, world: int, **changes: object) -> None:
        """A copy that an engine resumed after a step has the same model, bit for bit."""
        again = self.resume(run_dir, step, engine, world, **changes)
        ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (run_dir, again))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def run(self, engine: str, world: int, task: str = "train", precision: str = "no", **changes: object) -> Path:
        """The directory of the finished run."""
        digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]
        run_dir = self.folder / f"{engine}-{world}-{task}-{precision}-{digest}"
        if not run_dir.exists():
            answers = self.crowd(world).run(task, engine, self.file(run_dir, **changes), precision=precision)
            assert answers == ["done"] * world
        return run_dir


@pytest.fixture(scope="module")
def trainings(recipe: dict, crowds: Crowds, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("engines"), recipe, crowds)


@pytest.mark.parametrize(("engine", "world"), MATRIX)
def test_learns_what_one_process_does(trainings: Trainings, engine: str, world: int) -> None:
    one, many = trainings.run("ddp", 1), trainings.run(engine, world)
    assert_learned_alike(one, many, 0.05)
    norms = [[record["grad_norm"] for record in metrics(run_dir)] for run_dir in (one, many)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    ours, theirs = reader(one), reader(many)
    for name in ours.shapes:
        # A key bias has no true gradient (softmax is shift-invariant): Adam turns its rounding noise into steps.
        if not name.endswith("k_proj.bias"):
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                apart = (ours.tensor(kind, name) - theirs.tensor(kind, name)).abs()
                assert apart.square().mean().sqrt() < 1e-6, (kind, name)
                # And of a single gradient near zero.
                assert apart.max() < 5e-5, (kind, name)
    sizes = [part.stat().st_size for part in theirs.path.glob("part-*.safetensors")]
    assert len(sizes) == world
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.long
def test_a_compiled_run_has_a_graph_for_each_shape_and_no_more(trainings: Trainings, shards: Path) -> None:
    """Two stages, micro-batches, recomputation, and evaluations whose last batch has its own size."""
    changes = {
        "data": {"micro_batch_size": 4},
        "eval": {"tasks": [{"kind": "zero_shot", "data": str(shards)}], "every_samples": 80, "batch_size": 7},
        "model": {"gradient_checkpointing": True, "compile": True},
    }
    run_dir = trainings.run("fsdp2", 2, "train_compiled", **changes)
    assert close(losses(run_dir), losses(trainings.run("ddp", 1)))
    graphs = [int(file.read_text()) for file in trainings.folder.glob(f"{run_dir.name}.graphs-*")]
    # The image tower's of each stage and the text tower's, each with gradients and, in the first pass, without.
    assert graphs == [6, 6]


# Six steps, half of them masked.
SHORT = [
    {"name": "masked", "samples": 48, "mask_ratio": 0.75, "base_lr": 0.012, "warmup_samples": 16},
    {"name": "unmasked", "samples": 48},
]
HALF_MASKED = [{"name": "masked", "samples": 160, "mask_ratio": 0.5, "text_mask_ratio": 0.5, "base_lr": 0.012}]
FEATURES: dict[str, dict] = {
    "reconstruction": {"stages": HALF_MASKED, "loss": {"reconstruction_weight": 2.0}},
    # Images of 16 pixels, whole, then of 32 pixels, half masked: 4 and 8 patches. One schedule, with moments, has both.
    "two image sizes": {
        "stages": [
            {"name": "small", "samples": 80, "image_size": 16, "base_lr": 0.012, "warmup_samples": 16},
            {"name": "large", "samples": 80, "mask_ratio": 0.5},
        ]
    },
    "muon, layer decay": {"optim": {"name": "muon", "muon_lr_ratio": 3.0, "layer_decay": 0.5}},
    "layer decay": {"optim": {"layer_decay": 0.5}},
    "stochastic depth of two views": {"model": {"drop_path_rate": 0.5}, "mask": {"views": 2}},
    "masked texts, equal captions, two views": {
        "stages": HALF_MASKED,
        "loss": {"positives": "equal_captions", "kind": "sigmoid"},
        "mask": {"views": 2},
    },
}
MICRO_2, MICRO_4 = ({"data": {"micro_batch_size": size}} for size in (2, 4))
# Of the default stages, the first keeps its activations.
RECOMPUTED = {
    "model": {"gradient_checkpointing": True},
    "stages": [{**STAGES[0], "gradient_checkpointing": False}, STAGES[1]],
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("feature", "engine", "world", "again"),
    [
        ("two image sizes", "fsdp2", 2, {}),
        ("muon, layer decay", "ddp", 2, {}),
        ("muon, layer decay", "hsdp", 4, {}),
        ("layer decay", "zero3", 2, RECOMPUTED),
        ("stochastic depth of two views", "fsdp2", 2, RECOMPUTED),
        ("masked texts, equal captions, two views", "fsdp2", 2, MICRO_2),
        ("reconstruction", "zero3", 2, MICRO_4),
    ],
    ids=str,
)
def test_features_are_learned_as_on_one_process(
    trainings: Trainings, feature: str, engine: str, world: int, again: dict
) -> None:
    changes = changed_recipe(FEATURES[feature], again)
    one, many = trainings.run("ddp", 1, **FEATURES[feature]), trainings.run(engine, world, **changes)
    assert losses(one) != losses(trainings.run("ddp", 1))
    assert close(losses(one), losses(many))
    middle = len(losses(one)) // 2
    assert losses(trainings.resume(many, middle, engine, world, **changes)) == losses(many)


CAPTIONS = [{"caption_weight": 2.0, "caption_kind": "mixed"}, {"kind": "captioning"}]


@pytest.mark.long
@pytest.mark.parametrize(("engine", "loss"), [("fsdp2", CAPTIONS[1]), ("zero3", CAPTIONS[0])])
def test_captions_are_learned_as_on_one_process(
    trainings: Trainings, caption_tokenizer: Path, engine: str, loss: dict
) -> None:
    """Masked and not, in one pass and in micro-batches; resumed bit for bit; and exported by its own class."""
    changes = {
        "loss": loss,
        "data": {"tokenizer": str(caption_tokenizer)},
        "model": {"decoder_config": {"num_hidden_layers": 2}},
        "stages": SHORT,
        "save": {"every_samples": 32},
    }
    one, many = trainings.run("ddp", 1, **changes), trainings.run(engine, 2, **changes)
    assert_learned_alike(one, many, 0.05, num_steps=6)
    for name in reader(one).shapes:
        if not name.endswith("k_proj.bias"):
            assert (reader(one).tensor("weight", name) - reader(many).tensor("weight", name)).abs().max() < 5e-5, name
    in_parts = trainings.run(engine, 2, **changed_recipe(changes, MICRO_2))
    assert close(losses(one), losses(in_parts))
    by_ddp = norms(trainings.run("ddp", 2, **changes))
    assert len(by_ddp) == (12 if "caption_weight" in loss else 0)
    assert min(by_ddp, default=1.0) > 1e-3
    for run_dir in (many, in_parts):
        assert norms(run_dir) == pytest.approx(by_ddp, rel=1e-3)
    assert losses(trainings.resume(many, 2, engine, 2, **changes)) == losses(many)
    written = FlipForConditionalGeneration.from_pretrained(many / "model")
    for name, weight in written.named_parameters():
        assert torch.equal(weight, reader(many).tensor("weight", name)), name


@pytest.mark.parametrize(
    ("field", "refusal"),
    [
        ({"model": {"compile": True}}, "model.compile is true"),
        ({"optim": {"name": "muon"}}, "optim.name is 'muon'; the launch file's engine zero3 has adamw"),
    ],
)
def test_an_engine_refuses(trainings: Trainings, field: dict, refusal: str) -> None:
    for answer in trainings.crowd(2).run("train", "zero3", trainings.file(trainings.folder / "refused", **field)):
        assert answer.startswith(f"UserError: {refusal}")


@pytest.mark.parametrize(
    ("engine", "world", "data"), [("ddp", 1, {}), ("ddp", 2, {}), ("fsdp2", 2, MICRO_4), ("zero3", 2, {})], ids=str
)
def test_an_unused_parameter_is_named(
    trainings: Trainings, tmp_path: Path, engine: str, world: int, data: dict
) -> None:
    """On one process as on several, at the first step."""

    def train(run_dir: str, images_only: bool = False, **changes: dict) -> list[str]:
        loss = {"kind": "unscaled", "options": {"images_only": images_only}}
        file = trainings.file(tmp_path / run_dir, loss=loss, stages=SHORT, **data, **changes)
        return trainings.crowd(world).run("train_unscaled", engine, file)

    for images_only, named in ((False, "[logit_scale]"), (True, "[logit_scale, text_model, text_projection]")):
        for answer in train(f"run-{images_only}", images_only):
            assert re.match(rf"UserError: .* add {re.escape(named)} to model.frozen", answer)
    assert not list(tmp_path.glob("run-*/metrics.jsonl"))
    assert train("mended", model={"frozen": ["logit_scale"]}) == ["done"] * world
    assert len(losses(tmp_path / "mended")) == 6


@pytest.mark.long
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_averages_are_kept_evaluated_and_exported(trainings: Trainings, shards: Path, engine: str) -> None:
    tasks = [{"kind": "zero_shot", "data": str(shards)}, {"kind": "retrieval", "data": str(shards), "every_samples": 0}]
    changes = {"optim": {"ema_decay": 0.5}, "eval": {"tasks": tasks, "every_samples": 160, "batch_size": 7}}
    one, many = trainings.run("ddp", 1, **changes), trainings.run(engine, 2, **changes)
    assert close(losses(one), losses(many)), "training saw the averages"
    for name in ("vision_model.encoder.layers.1.mlp.fc1.weight", "logit_scale"):
        average, expected = reader(many).tensor("ema", name), reader(one).tensor("ema", name)
        assert torch.allclose(average, expected, atol=1e-5)
        assert not torch.equal(average, reader(many).tensor("weight", name))
        assert torch.equal(average, load_file(many / "model/model.safetensors")[name])
    folder = trainings.resume(many, 15, engine, 2, **changes)
    assert torch.equal(reader(folder).tensor("ema", name), reader(many).tensor("ema", name))
    evaluated = [[r for r in metrics(run_dir) if "loss" not in r] for run_dir in (one, many)]
    assert len(evaluated[0]) == len(evaluated[1]) == 2
    scores = [[value for r in records for name, value in sorted(r.items()) if "/" in name] for records in evaluated]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 4 + 4 + 7, "each task has its chance"


LOSSES: dict[str, dict] = {"infonce": {}, "sigmoid": {"kind": "sigmoid"}, "captions": CAPTIONS[0]}


@pytest.mark.parametrize(
    ("loss", "engine", "world"),
    [
        ("infonce", "fsdp2", 2),
        ("infonce", "zero3", 2),
        long("infonce", "ddp", 2),
        long("sigmoid", "fsdp2", 2),
        long("captions", "zero2", 2),
        long("infonce", "hsdp", 4),
    ],
)
def test_micro_batches_move_the_weights_as_one_batch_does(
    trainings: Trainings, caption_tokenizer: Path, loss: str, engine: str, world: int
) -> None:
    """Two steps at each mask ratio."""
    ratios = (0.0, 0.5, 0.75)
    changes = {
        "stages": [{"name": f"mask {r}", "samples": 32, "mask_ratio": r, "base_lr": 0.012} for r in ratios],
        # At the usual 1e-8 AdamW makes a step of the rounding noise of gradients that are zero, as a key bias's.
        "optim": {"adam_epsilon": 0.001},
        "loss": LOSSES[loss],
    }
    if loss == "captions":
        changes |= {
            "data": {"tokenizer": str(caption_tokenizer)},
            "model": {"decoder_config": {"num_hidden_layers": 1}},
        }
    runs = [
        trainings.run(*((engine, world) if loss == "infonce" else ("ddp", 2)), **changes),
        trainings.run(engine, world, **changed_recipe(changes, MICRO_2)),
    ]
    whole, parts = ([r for r in metrics(run_dir) if "loss" in r] for run_dir in runs)
    assert len(whole) == len(parts) == 6
    for a, b in zip(whole, parts, strict=True):
        for name in ("loss", "logit_scale"):
            assert b[name] == pytest.approx(a[name], rel=2e-6), name
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    ours, theirs = (reader(run_dir) for run_dir in runs)
    for name in ours.shapes:
        apart = (ours.tensor("weight", name) - theirs.tensor("weight", name)).abs().max()
        assert apart <= 1e-6, name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fsdp2", 2), ("hsdp", 4)),
        (("hsdp", 4), ("ddp", 1)),
        long(("fsdp2", 2), ("fsdp2", 1)),
        long(("ddp", 1), ("ddp", 2)),
        long(("zero3", 2), ("zero3", 4)),
    ],
)
def test_goes_on_at_another_world_size(trainings: Trainings, before: tuple[str, int], after: tuple[str, int]) -> None:
    resumed = trainings.resume(trainings.run(*before), 15, *after)
    assert close(losses(resumed), losses(trainings.run("ddp", 1)))


# Each engine writes and reads; of ZeRO, stage 2 also stands for stage 1.
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("zero2", 2), ("hsdp", 4)),
        (("zero3", 2), ("fsdp2", 4)),
        long(("fsdp2", 2), ("ddp", 2)),
        long(("hsdp", 4), ("zero3", 1)),
        long(("zero3", 2), ("zero1", 2)),
    ],
)
def test_a_checkpoint_is_the_same_under_every_engine(
    trainings: Trainings, before: tuple[str, int], after: tuple[str, int]
) -> None:
    """Loaded and saved again: bit for bit, weights and moments and the count of steps."""
    run_dir = trainings.folder / f"{before[0]}-{before[1]}-as-{after[0]}-{after[1]}"
    cut(trainings.run(*before), run_dir, 15)
    assert trainings.crowd(after[1]).run("rewrite", after[0], trainings.file(run_dir)) == ["done"] * after[1]
    ours, theirs = reader(run_dir), reader(run_dir / "copy")
    assert ours.shapes == theirs.shapes
    for name in ours.shapes:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(ours.tensor(kind, name), theirs.tensor(kind, name)), (kind, name)
    states = [json.loads((r.path / "state.json").read_text()) for r in (ours, theirs)]
    assert states[0]["optimizer_steps"] == states[1]["optimizer_steps"] == 5


@pytest.mark.parametrize("engine", ["fsdp2", long("zero3")])
def test_all_processes_tell_that_one_s_disk_is_full(trainings: Trainings, engine: str) -> None:
    run_dir = trainings.folder / f"{engine}-full"
    cut(trainings.run(engine, 2), run_dir, 5)
    answers = trainings.crowd(2).run("train_on_a_small_disk", engine, trainings.file(run_dir))
    assert answers[0] == answers[1]
    assert answers[0].startswith(f"OSError: checkpoint {run_dir}/checkpoints/step-00000010 could not be written (")
    assert "File too large" in answers[0]
    assert answers[0].endswith("free some space, and start the run again")
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000005"]
    assert trainings.crowd(2).run("train", engine, trainings.file(run_dir)) == ["done"] * 2
    assert losses(run_dir) == losses(trainings.run(engine, 2))


def test_any_checkpoint_is_exported(trainings: Trainings, tmp_path: Path, refused: Callable[..., str]) -> None:
    run_dir = trainings.run("fsdp2", 2)
    stored = CheckpointReader(run_dir / "checkpoints/step-00000015")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        main(["export", str(run_dir), "--step", "15", "--dtype", name, "--out", str(tmp_path / name)])
        for key, value in AutoModel.from_pretrained(tmp_path / name).named_parameters():
            assert value.dtype == dtype
            assert torch.equal(value, stored.tensor("weight", key).to(dtype)), key
    main(["export", str(run_dir)])
    newest = load_file(run_dir / "export-20/model.safetensors")
    assert all(torch.equal(value, newest[key]) for key, value in load_file(run_dir / "model/model.safetensors").items())
    assert "has no checkpoint; name a run directory" in refused("export", tmp_path)
    assert "step-00000007 does not exist; the checkpoints are step-000000" in refused("export", run_dir, "--step", 7)


@pytest.mark.parametrize("engine", ["fsdp2", long("zero3")])
def test_the_temperature_is_fp32_in_bf16(trainings: Trainings, engine: str) -> None:
    stages = [{"name": "slow", "samples": 96, "mask_ratio": 0.5, "base_lr": 0.0016, "warmup_samples": 16}]
    run_dir = trainings.run(engine, 2, precision="bf16", stages=stages)
    scale = reader(run_dir).tensor("weight", "logit_scale")
    assert scale != scale.bfloat16().float(), "on the bf16 grid"
    used = [record["logit_scale"] for record in metrics(run_dir) if "loss" in record]
    # Five steps of 1e-4, each of them seen: neighbours on the bf16 grid are 0.0625 apart, at the inverse 0.9.
    changes = [abs(after - before) for before, after in pairwise(used[1:])]
    assert all(0.0 < change < 0.01 for change in changes), used


@pytest.mark.long
def test_gradients_can_be_summed_in_bf16(trainings: Trainings) -> None:
    one, many = (trainings.run(engine, 2, precision="bf16") for engine in ("fsdp2", "fsdp2_bf16_reduce"))
    apart = [abs(a - b) for a, b in zip(losses(one), losses(many), strict=True)]
    assert apart[0] == 0.0
    assert 0.0 < max(apart) < 0.02


@pytest.mark.parametrize(
    ("engine", "optimizer"),
    [
        ("zero3", {"max_grad_norm": 0.1}),
        *(long(engine, {"max_grad_norm": 0.1}) for engine in ("ddp", "zero2")),
        ("fsdp2", {"name": "muon", "max_grad_norm": 0.1}),
    ],
    ids=str,
)
def test_steps_left_out_leave_no_trace(trainings: Trainings, engine: str, optimizer: dict) -> None:
    trainings.run(engine, 2, "leave_out", optim={"ema_decay": 0.5, **optimizer})
