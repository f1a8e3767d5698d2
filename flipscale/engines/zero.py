"""ZeRO-1, 2 and 3 by DeepSpeed: moments, then gradients, then weights partitioned, each parameter seen flat."""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flipscale.engines.engine import Batch, Engine, ModelMemory
from flipscale.engines.launch import Launch, shipped
from flipscale.engines.layout import Layout, Shard
from flipscale.engines.optimizers import build_optimizers, empty_state
from flipscale.io.errors import UserError

# DeepSpeed's own values, in elements, where its settings leave them out.
_BUCKET, _MAX_LIVE = 500_000_000, 1_000_000_000
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine(Engine):
    """DeepSpeed on the launch's settings. Weights are fp32 and products are autocast, as in data parallel; so the
    embeddings, `logit_scale` and the loss are fp32 at every stage.

    `named_parameters` of a stage-3 model are empty outside of their module's forward pass.
    """

    # ZeRO cuts matrices into flat pieces, and Muon needs their rows.
    optimizers_carried = ("adamw",)
    # DeepSpeed's optimiser; `wrapped` is its engine.
    zero: Any

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        if "RANK" not in os.environ:
            raise UserError(
                "ZeRO needs a launcher, which names this process's rank and its peers; start it by `accelerate launch "
                "--config_file FILE -m flipscale.pretrain` or `torchrun -m flipscale.pretrain`"
            )
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # On CPU it would compile an operation of its own, and wait for ever for the lock of a compilation that was
        # killed. Gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Of DeepSpeed's own calls.
        warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
        _check_settings(self.launch.deepspeed.get("zero_optimization", {}))
        deepspeed.init_distributed("nccl" if self.accelerator.device.type == "cuda" else "gloo", verbose=False)
        self.stage = _stage(self.launch)
        self.settings = {
            "torch_autocast": {"dtype": "bfloat16", "lower_precision_safe_modules": []},
            "zero_optimization": {"stage": self.stage},
            **self.launch.deepspeed,
            "train_micro_batch_size_per_gpu": self.batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.recipe.max_grad_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        self.settings["torch_autocast"] = {**self.settings["torch_autocast"], "enabled": self.launch.bf16}

    @classmethod
    def refusal(cls, launch: Launch, optimizer: str, compiles: bool = False) -> str | None:
        if compiles and _stage(launch) == 3:
            return (
                "model.compile is true and the launch file's engine is ZeRO-3, which gathers weights inside a block; "
                f"use {shipped('fsdp2')}, or model.compile false"
            )
        return super().refusal(launch, optimizer, compiles)

    @classmethod
    def memory(cls, model: nn.Module, launch: Launch, accumulates: bool = False) -> ModelMemory:
        """Every process has a flat part of each parameter's moments, and an fp32 copy of that part of the weights.
        Between the passes of a step, gradients wait whole; stage 3 has a place for its own part all the time."""
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        parts = {name: -(-size // launch.num_processes) for name, size in sizes.items()}
        whole, kept, stage = sum(sizes.values()), sum(parts.values()), _stage(launch)
        return ModelMemory(
            weights=kept if stage == 3 else whole,
            copies=kept,
            gradients={1: whole, 2: whole, 3: whole + kept}[stage] if accumulates else whole if stage == 1 else kept,
            moments=parts,
            communication_bytes=_transit_bytes(whole, launch) if launch.num_processes > 1 else 0,
        )

    def _place_block(self, block: nn.Module) -> None:
        if self.stage < 3:
            block.to(self.accelerator.device)
            return
        refusal = self.refusal(self.launch, self.recipe.name, compiles=block._compiled_call_impl is not None)
        if refusal is not None:
            raise UserError(refusal)
        import deepspeed

        deepspeed.zero.Init(module=block, config_dict_or_path=self.settings, mem_efficient_linear=False)

    def _place_rest(self) -> None:
        for buffers in (module._buffers for module in self.model.modules()):
            for name, buffer in buffers.items():
                buffers[name] = None if buffer is None else buffer.to(self.accelerator.device)
        self._place_block(self.model)

    def _make_layout(self) -> Layout:
        return (_Stage3Layout if self.stage == 3 else _FragmentLayout)(self.model, dist.get_rank(), self.launch)

    def prepare(self) -> None:
        import deepspeed

        (optimizer,) = build_optimizers(self.model, self.recipe)
        self.wrapped, self.zero, _, _ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=self.settings, dist_init_required=False
        )
        self.optimizers = [self.zero.optimizer]
        assert isinstance(self.layout, _ZeroLayout)
        self.layout.optimizers, self.layout.zero = self.optimizers, self.zero

    def _backward(self, loss: torch.Tensor) -> None:
        self.wrapped.backward(loss)

    def accumulate(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        if len(batches) == 1:
            yield batches[0]
            return
        with self.wrapped.coalesce_grad_reduction():
            yield from batches

    def gradient_norm(self) -> torch.Tensor:
        # DeepSpeed clips while it steps, and has -1 for a norm that is not finite.
        if self.stage == 3:
            groups = self.zero._get_norm_groups()
            norm = math.sqrt(sum(float(group) ** 2 for group in groups)) if min(groups) >= 0 else math.nan
        else:
            norm = float(self.zero.scaled_global_norm())
        return torch.tensor(norm if norm >= 0 else math.nan, device=self.accelerator.device)

    def _step(self, taken: torch.Tensor) -> None:
        """Collective. Have DeepSpeed step. It leaves out a step whose gradients are not finite, and to find that out it
        makes the host wait for them, in this step and in `gradient_norm`: under ZeRO the host never runs ahead."""
        if dist.get_rank() == 0:
            # It may be the loss alone that is not finite. The first number of the first gradient is never padding,
            # which DeepSpeed would not look at.
            first = next(iter(self.zero.averaged_gradients.values()))[0].view(-1)[:1]
            first.copy_(torch.where(taken > 0.0, first, math.nan))
        self.wrapped.step()
        assert isinstance(self.layout, _ZeroLayout)
        self.layout.steps += not self.zero.overflow


def _check_settings(given: dict[str, Any]) -> None:
    """Raise if DeepSpeed would refuse its settings, which it says in pages.

    Raises:
        ValueError: a setting that it does not know, or a value that it does not take.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(
            f"zero_optimization.{name} is {first['input']!r} in the launch's DeepSpeed settings, which DeepSpeed does "
            f"not take ({first['msg']}); see the settings in ds_configs/zero{given['stage']}.json"
        ) from error


def _stage(launch: Launch) -> int:
    return int(launch.engine.removeprefix("zero"))


def _transit_bytes(whole: int, launch: Launch) -> int:
    settings = launch.deepspeed.get("zero_optimization", {})
    # A bucket of gradients, and the next one where DeepSpeed need not wait; the weights that stage 3 keeps gathered.
    overlaps = settings.get("overlap_comm", _stage(launch) == 3)
    bucket = int(settings.get("reduce_bucket_size", _BUCKET)) * (2 if overlaps else 1)
    live = int(settings.get("stage3_max_live_parameters", _MAX_LIVE)) if _stage(launch) == 3 else 0
    return 4 * min(whole, live) + 4 * min(whole, bucket)


class _ZeroLayout(Layout):
    """Moments in DeepSpeed's flat groups, as `prepare` hands them over in `zero`.

    DeepSpeed gives its optimiser a state before the first step, so steps are counted here.
    """

    zero: Any

    def __init__(self, model: nn.Module, rank: int, launch: Launch):
        super().__init__(model, rank, launch.num_processes)
        self.steps = 0

    def optimizer_steps(self) -> int:
        return self.steps

    def forget_moments(self) -> None:
        super().forget_moments()
        self.steps = 0

    def allocate_moments(self, steps: int) -> None:
        for flat in self._flat_groups():
            self.optimizers[0].state[flat] = empty_state(self.optimizers[0], flat, steps)
        self.steps = steps

    def _flat_groups(self) -> Sequence[torch.Tensor]:
        raise NotImplementedError


class _FragmentLayout(_ZeroLayout):
    """Stages 1 and 2: weights whole, and of each parameter's moments the fragment that lies in this process's part of a
    group."""

    def moments(self, parameter: Any) -> dict[str, Shard]:
        fragment = parameter._hp_mapping if self.steps and parameter.requires_grad else None
        if fragment is None:
            return {}
        where = fragment.hp_fragment_address
        state = self.optimizers[0].state[self._flat_groups()[fragment.param_group_index]]
        return {
            name: Shard(state[name].narrow(0, where.start, where.numel), fragment.lp_fragment_address.start)
            for name in _MOMENTS
        }

    def saved_ranges(self) -> dict[str, range]:
        return {name: self._saved_range(parameter) for name, parameter in self.model.named_parameters()}

    def _saved_range(self, parameter: Any) -> range:
        if not parameter.requires_grad:
            return range(parameter.numel() if self.rank == 0 else 0)
        if parameter._hp_mapping is None:
            return range(0)
        where = parameter._hp_mapping.lp_fragment_address
        return range(where.start, where.start + where.numel)

    def _flat_groups(self) -> Sequence[torch.Tensor]:
        return self.zero.single_partition_of_fp32_groups


class _Stage3Layout(_ZeroLayout):
    """Stage 3: of each parameter and its moments a partition, the last ones padded."""

    def shape(self, parameter: Any) -> torch.Size:
        return parameter.ds_shape

    def weights(self, parameter: Any) -> Shard:
        return self._unpadded(parameter, parameter.ds_tensor.detach())

    def _unpadded(self, parameter: Any, partition: torch.Tensor) -> Shard:
        size = self.shape(parameter).numel()
        first = min(partition.numel() * self.rank, size)
        return Shard(partition[: size - first], first)

    def weights_changed(self) -> None:
        """Collective. Gather anew the small parameters that DeepSpeed keeps whole beside their partitions."""
        whole = self.zero.persistent_parameters
        if whole:
            whole[0].partition(whole)
            whole[0].all_gather(whole)

    def moments(self, parameter: Any) -> dict[str, Shard]:
        if self.steps == 0 or not parameter.requires_grad:
            return {}
        group, start, count = self.zero.grad_position[self.zero.get_param_id(parameter)]
        state = self.optimizers[0].state[self._flat_groups()[group]]
        return {name: self._unpadded(parameter, state[name].narrow(0, start, count)) for name in _MOMENTS}

    def saved_ranges(self) -> dict[str, range]:
        shards = {name: self.weights(parameter) for name, parameter in self.model.named_parameters()}
        return {name: range(first, first + values.numel()) for name, (values, first) in shards.items()}

    def _flat_groups(self) -> Sequence[torch.Tensor]:
        return self.zero.fp32_partitioned_groups_flat
