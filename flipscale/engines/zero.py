"""ZeRO-1, 2 and 3 by DeepSpeed: stages partition moments, then gradients, then weights, as flat tensors."""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from flipscale.engines.engine import Batch, Engine, Layout, ModelMemory, Shard, ShardedLayout
from flipscale.engines.launch import Launch, shipped
from flipscale.engines.optimizers import build_optimizers, empty_state, num_trained
from flipscale.io.errors import UserError
from flipscale.process.state import set_defaults

# DeepSpeed's defaults, in elements.
_BUCKET, _MAX_LIVE = 500_000_000, 1_000_000_000
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine(Engine):
    """DeepSpeed with the launch's settings.

    Weights are fp32 and products are autocast, as in data parallel. So the embeddings, `logit_scale` and the loss are
    fp32 at every stage. The parameters of a stage-3 model are empty outside of their module's forward pass.
    """

    # No Muon, because ZeRO cuts matrices into flat pieces and Muon needs rows.
    optimizers_carried = ("adamw",)
    # DeepSpeed's optimiser; `wrapped` is its engine.
    zero: Any

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        if "RANK" not in os.environ:
            raise UserError(
                "RANK is not set; ZeRO needs a launcher. Fix: use `accelerate launch --config_file FILE -m "
                "flipscale.pretrain` or `torchrun -m flipscale.pretrain`"
            )
        if not torch.cuda.is_available():
            set_defaults(DS_ACCELERATOR="cpu")
        import deepspeed

        # On a CPU DeepSpeed would compile this operation, and wait forever for the lock of a killed compilation.
        # Gloo is as good.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed's own calls cause this warning.
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
                "model.compile is true; expected false with ZeRO-3, which gathers weights inside of a block. Fix: use "
                f"{shipped('fsdp2')}, or model.compile false"
            )
        return super().refusal(launch, optimizer, compiles)

    @classmethod
    def memory(cls, model: nn.Module, launch: Launch, accumulates: bool = False) -> ModelMemory:
        """Return the memory: a flat part of each parameter's moments, and an fp32 copy of that part of the weights.

        Between the passes of a step, gradients are whole; stage 3 always has a buffer for its own part too.
        """
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        parts = {name: -(-size // launch.num_processes) for name, size in sizes.items()}
        moments = {name: parts[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
        whole, trained, kept, stage = sum(sizes.values()), num_trained(model), sum(moments.values()), _stage(launch)
        settings = launch.deepspeed.get("zero_optimization", {})
        # A bucket of gradients, and a second bucket if communication overlaps; weights that stage 3 keeps gathered.
        buckets = 2 if settings.get("overlap_comm", stage == 3) else 1
        transit = min(trained, buckets * int(settings.get("reduce_bucket_size", _BUCKET)))
        if stage == 3:
            transit += min(whole, int(settings.get("stage3_max_live_parameters", _MAX_LIVE)))
        gradients = trained if stage == 1 else kept
        return ModelMemory(
            weights=sum(parts.values()) if stage == 3 else whole,
            copies=kept,
            gradients=(trained + kept if stage == 3 else trained) if accumulates else gradients,
            moments=moments,
            communication_bytes=4 * transit if launch.num_processes > 1 else 0,
        )

    def shard(self, part: nn.Module, is_block: bool = True) -> Layout:
        if self.stage < 3:
            part.to(self.accelerator.device)
            return _FragmentLayout(part, dist.get_rank(), self.launch)
        if (refusal := self.refusal(self.launch, self.recipe.name, part._compiled_call_impl is not None)) is not None:
            raise UserError(refusal)
        import deepspeed

        deepspeed.zero.Init(module=part, config_dict_or_path=self.settings, mem_efficient_linear=False)
        for buffers in (module._buffers for module in part.modules()):
            for name, buffer in buffers.items():
                buffers[name] = None if buffer is None else buffer.to(self.accelerator.device)
        return _Stage3Layout(part, dist.get_rank(), self.launch)

    def _prepare(self, frozen: Sequence[str]) -> None:
        import deepspeed

        self._freeze(frozen)
        # Parameters with a gradient, which DeepSpeed drops during the backward pass.
        self._reached: set[int] = set()
        trained = [parameter for parameter in self._trainable if parameter.requires_grad]
        self._hooks = [p.register_hook(lambda _, p=p: self._reached.add(id(p))) for p in trained]
        (optimizer,) = build_optimizers(self.model, self.recipe)
        self.wrapped, self.zero, _, _ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=self.settings, dist_init_required=False
        )
        self.optimizers = [self.zero.optimizer]
        assert isinstance(self.layout, _ZeroLayout)
        self.layout.optimizers, self.layout.zero = self.optimizers, self.zero

    def _release(self) -> None:
        self.wrapped.destroy()
        self.layout.forget_moments()
        for parameter in cast("list[Any]", self._trainable):
            # Weights are views of the flat tensors of the trained weights, which a copy lets go.
            held = parameter.ds_tensor if self.stage == 3 else parameter
            held.data = held.data.clone()
        super()._release()
        self.zero = self.layout.zero = None  # type: ignore[attr-defined]

    def _backward(self, loss: torch.Tensor) -> None:
        self.wrapped.backward(loss)

    def accumulate(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        if len(batches) == 1:
            yield batches[0]
            return
        with self.wrapped.coalesce_grad_reduction():
            yield from batches

    def check_gradients(self) -> None:
        super().check_gradients()
        while self._hooks:
            self._hooks.pop().remove()

    def _has_gradient(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._reached

    def gradient_norm(self) -> torch.Tensor:
        # DeepSpeed clips in its step. Its norm is -1 if it is not finite.
        if self.stage == 3:
            groups = self.zero._get_norm_groups()
            norm = math.sqrt(sum(float(group) ** 2 for group in groups)) if min(groups) >= 0 else math.nan
        else:
            norm = float(self.zero.scaled_global_norm())
        return torch.tensor(norm if norm >= 0 else math.nan, device=self.accelerator.device)

    def _step(self, should_step: torch.Tensor) -> None:
        """Collective. Let DeepSpeed step. It skips a step with non-finite gradients.

        For this check the host waits for the gradients, here and in `gradient_norm`, so under ZeRO it never runs ahead.
        """
        if dist.get_rank() == 0:
            # DeepSpeed must skip the step also if only the loss is not finite. It ignores padding, and the first number
            # of the first gradient is never padding. No stream is waited for: DeepSpeed's backward pass has waited for
            # its reductions, and without fp16 its step reads gradients on this stream.
            first = next(iter(self.zero.averaged_gradients.values()))[0].view(-1)[:1]
            first.copy_(torch.where(should_step > 0.0, first, math.nan))
        self.wrapped.step()
        assert isinstance(self.layout, _ZeroLayout)
        self.layout.steps += not self.zero.overflow


def _check_settings(given: dict[str, Any]) -> None:
    """Raise a UserError for DeepSpeed's first invalid setting, because its own message takes pages."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(
            f"zero_optimization.{name} is {first['input']!r} in the launch's DeepSpeed settings; DeepSpeed refuses it "
            f"({first['msg']}). Fix: see ds_configs/zero{given['stage']}.json"
        ) from error


def _stage(launch: Launch) -> int:
    return int(launch.engine.removeprefix("zero"))


class _ZeroLayout(ShardedLayout):
    """A layout with moments in DeepSpeed's flat groups. The engine sets `zero`.

    Steps are counted here, because DeepSpeed's optimiser has a state before the first step.
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
    """Stages 1 and 2: weights are whole; each process has the fragments of moments in its part of a group."""

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
        ranges, parameters = {}, cast("dict[str, Any]", dict(self.model.named_parameters()))
        for name, parameter in parameters.items():
            ranges[name] = range(0 if parameter.requires_grad or self.rank else parameter.numel())
            if parameter.requires_grad and parameter._hp_mapping is not None:
                where = parameter._hp_mapping.lp_fragment_address
                ranges[name] = range(where.start, where.start + where.numel)
        return ranges

    def _flat_groups(self) -> Sequence[torch.Tensor]:
        return self.zero.single_partition_of_fp32_groups


class _Stage3Layout(_ZeroLayout):
    """Stage 3: each process has a partition of each parameter and its moments; the last partitions are padded."""

    def shape(self, parameter: Any) -> torch.Size:
        return parameter.ds_shape

    def weights(self, parameter: Any) -> Shard:
        return self._unpadded(parameter, parameter.ds_tensor.detach())

    def _unpadded(self, parameter: Any, partition: torch.Tensor) -> Shard:
        size = self.shape(parameter).numel()
        first = min(partition.numel() * self.rank, size)
        return Shard(partition[: size - first], first)

    def weights_changed(self) -> None:
        """Collective. Gather again the small parameters that DeepSpeed also keeps whole."""
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
