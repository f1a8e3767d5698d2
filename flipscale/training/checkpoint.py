"""Checkpoints: `checkpoints/step-00012345/`, written aside and renamed, keyed by parameter name and nothing else.

    model.safetensors       fp32 weights
    optimizer.safetensors   moments as `exp_avg.NAME`, `momentum_buffer.NAME`, `step.NAME`, ...
    state.json              step, samples seen, samples in the data set, versions
    recipe.yaml             as resolved

The layout knows no process count and no engine, so a run resumes at another world size.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class SaveRecipe:
    """When checkpoints are written.

    Args:
        every_samples: how often; 0 only at the end and on a stop signal.
        total_limit: how many are kept, the newest ones.
    """

    every_samples: int = 0
    total_limit: int = 2


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    found = _checkpoints(run_dir)
    return found[-1] if found else None


def _checkpoints(run_dir: Path) -> list[Path]:
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name))


def save_checkpoint(
    run_dir: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: dict[str, Any],
    recipe_yaml: str,
    total_limit: int,
) -> Path:
    """The folder of the checkpoint of `state["step"]`, durable on disk when this returns.

    Called by the main process alone, with the unwrapped model.

    Raises:
        OSError: the disk is full or not writable; the checkpoints that were there still are.
    """
    final = run_dir / "checkpoints" / f"step-{state['step']:08d}"
    if final.exists():
        return final
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(
            {n: p.detach().cpu().contiguous() for n, p in model.state_dict().items()}, partial / "model.safetensors"
        )
        tensors = {key: value.detach().cpu().contiguous() for key, value in _optimizer_tensors(model, optimizers)}
        save_file(tensors, partial / "optimizer.safetensors")
        (partial / "recipe.yaml").write_text(recipe_yaml)
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        partial.rename(final)
        _sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"checkpoint {final} could not be written ({error}); the ones before it are whole: free some space and "
            "start the run again"
        ) from error
    for old in _checkpoints(run_dir)[: -max(total_limit, 1)]:
        shutil.rmtree(old)
    return final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`, and the saved recipe under `recipe`."""
    state = json.loads((checkpoint / "state.json").read_text())
    return {**state, "recipe": yaml.safe_load((checkpoint / "recipe.yaml").read_text())}


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Fills the weights of an unwrapped model."""
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))


def load_optimizers(checkpoint: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Fills the optimisers' moments, by parameter name.

    Raises:
        ValueError: the checkpoint was written with another optimiser.
    """
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        stored: dict[str, dict[str, torch.Tensor]] = {}
        for key in file.keys():  # noqa: SIM118
            field, _, name = key.partition(".")
            stored.setdefault(name, {})[field] = file.get_tensor(key)
    for name, parameter, optimizer in _owners(model, optimizers):
        moment = "momentum_buffer" if isinstance(_plain(optimizer), torch.optim.Muon) else "exp_avg"
        if moment not in stored.get(name, {}):
            raise ValueError(f"checkpoint {checkpoint} has no {moment} for {name}; was optim.name another?")
        optimizer.state[parameter] = {
            # The fused AdamW keeps its step count, like the moments, on the parameter's device.
            field: value.to(parameter.device)
            for field, value in stored[name].items()
        }


def _plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimiser inside an engine's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _optimizer_tensors(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter, optimizer in _owners(model, optimizers):
        for field, value in optimizer.state[parameter].items():
            yield f"{field}.{name}", torch.as_tensor(value)


def _owners(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
    owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) in owner:
            yield name, parameter, owner[id(parameter)]
