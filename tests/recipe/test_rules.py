"""The rules between fields of a recipe: each has a recipe that breaks it, and one that keeps it."""

import ast
import inspect
import shlex
import subprocess
import sys

import pytest

from flipscale.io.errors import UserError
from flipscale.recipe import rules
from flipscale.recipe.recipe import Recipe, parse_fields

STAGES = "--stages '[{name: a, samples: 160, mask_ratio: 0.5, base_lr: 0.1}, {name: b, samples: 160}]'"
BASE = f"{STAGES} --data.global_batch_size 16 --data.shards x"
TIMED = "--budget_minutes 1 --stages '[{name: a, share: 0.9, base_lr: 0.1}, {name: b, share: 0.1}]'"
SOURCES = "--data.shards null --data.sources"
STORED = "--stages.a.mask_ratio 0 --model.init_from m --data.image_features f"
TEXTS = "--model.init_from m --data.text_features f"
LORA = "--model.init_from m --optim.lora.rank 2"
CLASSIFY = "--loss.kind classify --loss.options.num_classes 2"
TEXT_MASK = "--stages.b.text_mask_ratio 0.5"

# Flags that break a rule, flags that keep it, and words of the refusal.
CASES = [
    ("--model.text_rows matched", "--model.text_rows matched --model.init_from m", "model.text_rows is 'matched'"),
    (
        "--model.family towers --model.vision hf:a --model.text b",
        "--model.family towers --model.vision a --model.text b",
        "model.vision is 'hf:a'", "model.family is 'towers'",
    ),
    (
        "--model.text hf:b", "--model.text hf:b --model.vision a --data.text_features f",
        "model.text is 'hf:b'", "data.text_features is not set",
    ),
    (
        "--model.family clip --model.vision a", "--model.family clip --model.init_from a",
        "model.vision is 'a'", "model.family is 'clip'",
    ),
    ("--model.init_from m --model.text b", "--model.text b", "model.text is 'b'", "model.init_from is 'm'"),
    (
        "--model.family towers --model.vision a", "--model.family towers --model.init_from m",
        "model.family is 'towers'", "model.vision is 'a'",
    ),
    ("--model.init_from open_clip:a", "--model.init_from a/b", "model.init_from is 'open_clip:a'"),
    (
        "--model.decoder_config '{num_hidden_layers: 1}'",
        "--model.decoder_config '{num_hidden_layers: 1}' --loss.caption_weight 1",
        "model.decoder_config is {'num_hidden_layers': 1}", "loss.caption_weight",
    ),
    (
        "--model.family clip --model.drop_path_rate 0.1", "--model.drop_path_rate 0.1",
        "model.drop_path_rate is 0.1", "model.family is 'clip'",
    ),
    ("--data.crop_scale [0.9,0.5]", "--data.crop_scale [0.5,0.9]", "data.crop_scale is [0.9, 0.5]"),
    ("--data.captions '{alt: 0}'", "--data.captions '{alt: 1}'", "data.captions is {'alt': 0"),
    ("--stages.b.captions '{alt: 0}'", "--stages.b.captions '{alt: 1}'", "stages.b.captions is {'alt': 0"),
    ("--data.lanes 5", "--data.lanes 4", "data.lanes 5", "global_batch_size 16", "4 or 8"),
    ("--data.sources '[{shards: a}]'", f"{SOURCES} '[{{shards: a}}]'", "data.shards is 'x'", "names 1"),
    (
        f"{SOURCES} '[{{shards: a}}]' --data.weights w", f"{SOURCES} '[{{shards: a, weights: w}}]'",
        "data.weights is 'w'", "names 1",
    ),
    (f"{SOURCES} '[{{split: a}}]'", f"{SOURCES} '[{{dataset: a}}]'", "data.sources[0] has neither shards nor dataset"),
    (
        f"{SOURCES} '[{{shards: a, dataset: b}}]'", f"{SOURCES} '[{{shards: a}}, {{dataset: b}}]'",
        "data.sources[0] has shards and dataset",
    ),
    ("--data.weights w --data.fraction 0.5", "--data.weights w", "data.fraction is 0.5", "data.weights is 'w'"),
    (
        f"{SOURCES} '[{{shards: a, weight: 1}}, {{shards: b}}]'",
        f"{SOURCES} '[{{shards: a, weight: 1}}, {{shards: b, weight: 2}}]'", "1 of 2 data.sources have a weight",
    ),
    (
        f"{SOURCES} '[{{shards: a, weight: 1}}, {{shards: b, weight: 1.0e-6}}]'",
        f"{SOURCES} '[{{shards: a, weight: 1}}, {{shards: b, weight: 1.0e-3}}]'", "data.sources[1].weight is 1e-06",
    ),
    (
        "--data.pack_captions true --loss.kind captioning", "--data.pack_captions true",
        "loss.kind is 'captioning'", "data.pack_captions is true",
    ),
    (
        "--data.augment.mixup_alpha 0.5", f"{CLASSIFY} --data.augment.mixup_alpha 0.5",
        "data.augment.mixup_alpha is 0.5", "'infonce'",
    ),
    (f"{STORED} --stages.a.mask_ratio 0.5", STORED, "stages.a.mask_ratio is 0.5", "data.image_features is 'f'"),
    (f"{STORED} --model.drop_path_rate 0.1", STORED, "model.drop_path_rate is 0.1", "data.image_features is 'f'"),
    (f"{TEXTS} {TEXT_MASK}", TEXTS, "stages.b.text_mask_ratio is 0.5", "data.text_features is 'f'"),
    (f"{TEXTS} --loss.captions_per_image 2", TEXTS, "loss.captions_per_image is 2", "data.text_features is 'f'"),
    (f"{STORED} --model.init_from null", STORED, "data.image_features is 'f'", "model.init_from"),
    (f"{STORED} --data.fraction 0.5", STORED, "data.image_features is 'f'", "fraction"),
    (
        "--data.teachers [t] --data.captions '{alt: 1}'", "--data.teachers [t]",
        "data.captions is {'alt': 1", "data.teachers has 't'",
    ),
    ("--data.teachers [t] --loss.kind sigmoid", "--loss.kind sigmoid", "loss.kind is 'sigmoid'", "teachers has 't'"),
    (
        "--data.teachers [t] --data.augment.color_jitter.hue 0.1", "--data.augment.color_jitter.hue 0.1",
        "data.augment.color_jitter.hue is 0.1", "data.teachers has 't'",
    ),
    (
        f"--data.teachers [t] {SOURCES} '[{{dataset: a}}]'", f"--data.teachers [t] {SOURCES} '[{{shards: a}}]'",
        "data.teachers has 't'", "one source",
    ),
    (
        "--loss.teacher_weight 0.0", "--loss.teacher_weight 0.0 --data.teachers [t]",
        "loss.teacher_weight is 0.0", "data.teachers",
    ),
    (
        "--loss.positives equal_captions", "--loss.positives equal_captions --loss.kind sigmoid",
        "loss.positives is 'equal_captions'", "'infonce'",
    ),
    ("--loss.prefix_dims [4,8]", "--loss.prefix_dims []", "loss.prefix_dims is [4, 8]"),
    (
        "--loss.captions_per_image 2 --loss.kind captioning", "--loss.captions_per_image 2 --loss.kind sigmoid",
        "loss.kind is 'captioning'", "loss.captions_per_image is 2",
    ),
    (
        "--loss.captions_per_image 2 --mask.views 2", "--loss.captions_per_image 2",
        "mask.views is 2", "loss.captions_per_image is 2",
    ),
    (
        "--loss.captions_per_image 2 --loss.kind sigmoid --loss.positives equal_captions",
        "--loss.kind sigmoid --loss.positives equal_captions", "loss.positives", "loss.captions_per_image is 2",
    ),
    (
        f"{CLASSIFY} --loss.reconstruction_weight 1", "--loss.reconstruction_weight 1",
        "loss.kind is 'classify'", "loss.reconstruction_weight is 1.0",
    ),
    (
        "--loss.caption_weight 1 --loss.kind captioning", "--loss.caption_weight 1 --loss.kind sigmoid",
        "loss.kind is 'captioning'", "loss.caption_weight is 1.0",
    ),
    (
        "--loss.caption_weight 1 --loss.reconstruction_weight 2", "--loss.reconstruction_weight 2",
        "loss.caption_weight is 1.0", "loss.reconstruction_weight is 2.0",
    ),
    (
        "--loss.reconstruction_weight 1 --mask.views 2", "--mask.views 2",
        "mask.views is 2", "loss.reconstruction_weight is 1.0",
    ),
    (f"{CLASSIFY} {TEXT_MASK}", CLASSIFY, "stages.b.text_mask_ratio is 0.5", "'classify'"),
    (f"--loss.kind captioning {TEXT_MASK}", TEXT_MASK, "stages.b.text_mask_ratio is 0.5", "every word"),
    (f"--loss.caption_weight 1 {TEXT_MASK}", "--loss.caption_weight 1", "stages.b.text_mask_ratio is 0.5"),
    ("--optim.lora.rank 2", LORA, "optim.lora.rank is 2", "model.init_from"),
    (f"{LORA} --optim.name muon", LORA, "optim.lora.rank is 2", "optim.name is 'muon'"),
    (f"{LORA} --loss.caption_weight 1", LORA, "optim.lora.rank is 2", "decoder"),
    ("--log.every_share 0.1", f"{TIMED} --log.every_share 0.1", "log.every_share is 0.1", "budget_minutes"),
    ("--eval.every_share 0.1", f"{TIMED} --eval.every_share 0.1", "eval.every_share is 0.1", "budget_minutes"),
    (
        f"{TIMED} --eval.every_share 0.1 --eval.every_samples 16", "--eval.every_samples 16",
        "eval.every_samples is 16", "eval.every_share is 0.1",
    ),
    ("--hub.push_to_hub true", "--hub.push_to_hub true --hub.hub_model_id a/b", "hub.hub_model_id is not set"),
    ("--stages.b.name a", "--stages.b.name c", "2 stages are named 'a'"),
    (f"{TIMED} --stages.a.samples 160", "--budget_minutes 1", "'a'", "samples", "use share"),
    ("--stages.a.share 0.5", TIMED, "'a'", "share needs budget_minutes"),
    (f"{TIMED} --stages.b.share 0.2", TIMED, "add up to 1.1"),
    ("--stages.b.samples 15", "--stages.b.samples 16", "'b'", "15 samples", "16 pairs"),
    ("--stages.a.warmup_samples 320", "--stages.a.warmup_samples 304", "'a'", "320 samples", "schedule of 320"),
    (f"{TIMED} --stages.b.base_lr 1 --stages.b.warmup_share 0.1", TIMED, "'b'", "0.1 of the budget"),
    (
        "--stages.b.warmup_samples 16", "--stages.b.warmup_samples 16 --stages.b.base_lr 1",
        "'b'", "warmup_samples needs a base_lr",
    ),
    ("--stages.b.schedule constant", "--stages.b.schedule constant --stages.b.base_lr 1", "'b'", "needs a base_lr"),
    (
        "--stages.b.schedule cooldown", "--stages.b.schedule cooldown --stages.a.schedule constant",
        "'b'", "the rate before it is cosine, not constant",
    ),
    ("--stages.a.schedule cooldown", "--stages.a.schedule constant", "'a'", "no stage is before it"),
    (
        "--stages.a.schedule constant --stages.b.schedule linear_cooldown --stages.b.base_lr 1",
        "--stages.a.schedule constant --stages.b.schedule linear_cooldown", "'b'", "base_lr is 1",
    ),
    (
        "--stages.b.frozen [text_model]", "--stages.b.frozen [text_model] --stages.b.base_lr 1",
        "'b'", "frozen is ['text_model']", "base_lr",
    ),
]  # fmt: skip


def recipe_of(flags: str) -> Recipe:
    return parse_fields(shlex.split(f"{BASE} {flags}"))


@pytest.mark.parametrize(("breaks", "keeps", "words"), [(breaks, keeps, words) for breaks, keeps, *words in CASES])
def test_rule(breaks: str, keeps: str, words: list[str]) -> None:
    rules.check_rules(recipe_of(keeps))
    with pytest.raises(UserError) as raised:
        rules.check_rules(recipe_of(breaks))
    assert all(word in str(raised.value) for word in words), raised.value


def test_each_rule_is_in_the_table() -> None:
    """The line of each `yield` in a section is the one that refuses a recipe above."""
    reached = set()
    for breaks, *_ in CASES:
        found = rules.refusals(recipe_of(breaks))
        next(found)
        reached.add(found.gi_yieldfrom.gi_frame.f_lineno)  # type: ignore[attr-defined]
    sections = {section.__name__ for section in rules.SECTIONS}
    tree = ast.parse(inspect.getsource(rules))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in sections]
    every = {node.lineno for one in functions for node in ast.walk(one) if isinstance(node, ast.Yield | ast.YieldFrom)}
    assert every - reached == set()


def test_a_recipe_of_parts_keeps_the_rules() -> None:
    """`parse_recipe` reads recipes whose stages come later."""
    rules.check_rules(Recipe())


def test_the_rules_need_no_torch() -> None:
    code = "import flipscale.recipe.rules, sys; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)
