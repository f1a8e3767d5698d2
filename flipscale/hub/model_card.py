"""The card of a trained model: what it is, what it learned from, what it can do; every number from the run's files."""

import json
from pathlib import Path
from typing import Any

import yaml

_CARD = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags:
- flip
- clip
- flipscale
license: {licence}
---

# {name}

A CLIP-family model trained by masking (FLIP, [arXiv 2212.00794](https://arxiv.org/abs/2212.00794)) with flipscale
{version}: {parameters:.1f} M parameters, {image_size}-pixel images in patches of {patch_size}.

## Use

```python
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="{path}", trust_remote_code=True)
classify("image.png", candidate_labels=["a red apple", "a bicycle"], hypothesis_template="{{}}")
```

With flipscale installed, `from flipscale.model import FlipModel` needs no `trust_remote_code`.

## Training

{seen:,} pairs seen in {hours}, {num_processes} process(es), precision {mixed_precision}; {data_samples:,} pairs in
`{shards}`, batches of {global_batch_size}, optimiser {optimizer}.

| stage | pairs | patches removed | base rate per 256 |
|---|---:|---:|---:|
{stages}

## Results

{results}

## Limits

Trained on the pairs named above and tested on nothing else than the table says. It carries whatever bias its captions
carry. Not meant for surveillance or for decisions about people.
"""


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


def _results(records: list[dict[str, Any]]) -> str:
    last: dict[str, float] = {}
    for record in records:
        last.update({name: value for name, value in record.items() if "/" in name})
    if not last:
        return "Not evaluated."
    rows = [f"| {name.replace('/', ': ').replace('_', ' ')} | {value:.2f} % |" for name, value in last.items()]
    return "\n".join(["| metric | value |", "|---|---:|", *rows])


def model_card(run_dir: Path, num_parameters: int, data_samples: int, licence: str = "other") -> str:
    """The card of the run in `run_dir`, as Markdown with its metadata."""
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    environment = json.loads((run_dir / "environment.json").read_text())
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((run_dir / "model" / "config.json").read_text())["vision_config"]
    stages = [
        f"| {stage['name']} | {stage['samples']:,} | {stage['mask_ratio']:.0%} | {stage['base_lr'] or 'goes on'} |"
        for stage in recipe["stages"]
    ]
    return _CARD.format(
        licence=licence,
        name=run_dir.name,
        path=run_dir / "model",
        version=environment["flipscale"],
        parameters=num_parameters / 1e6,
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        seen=records[-1]["samples_seen"],
        hours=_duration(records[-1]["trained_seconds"]),
        num_processes=environment["num_processes"],
        mixed_precision=environment["mixed_precision"],
        data_samples=data_samples,
        shards=recipe["data"]["shards"],
        global_batch_size=recipe["data"]["global_batch_size"],
        optimizer=recipe["optim"]["name"],
        stages="\n".join(stages),
        results=_results(records),
    )
