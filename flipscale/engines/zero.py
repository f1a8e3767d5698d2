"""ZeRO-1, 2 and 3 by DeepSpeed: moments, then gradients, then weights partitioned, each seen flat."""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flipscale.engines.engine import Batch, Engine, Part
from flipscale.engines.optimizers import build_optimizers, empty_state


class ZeroEngine(Engine):
    """DeepSpeed on the launch file's settings. Weights are fp32 and products are autocast, as in data parallel; so the
    embeddings, `logit_scale` and the loss are fp32 at every stage.

    `named_parameters` of a stage-3 model are empty outside of their module's forward pass.
    """

    # DeepSpeed's engine, and its optimiser.
    model: Any
    zero: Any

    def __init__(self, *arguments: Any, settings: dict[str, Any]):
        super().__init__(*arguments)
        if self.recipe.name == "muon":
            raise ValueError(
                "optim.name is 'muon' and the launch file's engine is ZeRO, which cuts matrices into flat pieces; use "
                "ds_configs/fsdp2.yaml or ddp.yaml, or optim.name adamw"
            )
        import deepspeed

        # Of DeepSpeed's own calls.
        warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
        deepspeed.init_distributed("nccl" if self.accelerator.device.type == "cuda" else "gloo", verbose=False)
        self.settings = {
            "torch_autocast": {"dtype": "bfloat16", "lower_precision_safe_modules": []},
            **settings,
            "train_micro_batch_size_per_gpu": self.batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.recipe.max_grad_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        self.settings["torch_autocast"]["enabled"] = self.accelerator.mixed_precision == "bf16"
        self.stage = int(settings["zero_optimization"]["stage"])
        self.name = f"zero{self.stage}"
        self._steps = 0

    def _keep(self, block: nn.Module) -> None:
        if self.stage == 3 and block._compiled_call_impl is not None:
            raise ValueError(
                "model.compile is true and the launch file's engine is ZeRO-3, which gathers weights inside a block; "
                "use ds_configs/fsdp2.yaml, or model.compile false"
            )
        if self.stage == 3:
            import deepspeed

            deepspeed.zero.Init(module=block, config_dict_or_path=self.settings, mem_efficient_linear=False)
        else:
            block.to(self.accelerator.device)

    def _keep_rest(self) -> None:
        for buffers in (module._buffers for module in self.weights.modules()):
            for name, buffer in buffers.items():
                buffers[name] = None if buffer is None else buffer.to(self.accelerator.device)
        self._keep(self.weights)

    def prepare(self) -> None:
        import deepspeed

        # Names, since stage 3 leaves its parameters without a shape.
        (optimizer,) = build_optimizers(self.weights.named_parameters(), self.recipe)
        self.model, self.zero, _, _ = deepspeed.initialize(
            model=self.weights, optimizer=optimizer, config=self.settings, dist_init_required=False
        )
        self.optimizers = [self.zero.optimizer]

    def __call__(self, **batch: Any) -> Any:
        return self.model(**batch, return_logits=False)

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss)

    def accumulate(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        if len(batches) == 1:
            yield batches[0]
            return
        with self.model.coalesce_grad_reduction():
            yield from batches

    def gradient_norm(self) -> torch.Tensor:
        # DeepSpeed clips while it steps, and has -1 for a norm that is not finite.
        if self.stage == 3:
            groups = self.zero._get_norm_groups()
            norm = math.sqrt(sum(float(group) ** 2 for group in groups)) if min(groups) >= 0 else math.nan
        else:
            norm = float(self.zero.scaled_global_norm())
        return torch.tensor(norm if norm >= 0 else math.nan, device=self.accelerator.device)

    def _step(self, finite: bool) -> None:
        if not finite and dist.get_rank() == 0:
            # DeepSpeed leaves out a step whose gradients are not finite; a loss alone may be what is not. The first
            # number of the first gradient is no padding, which would stay as it is made here.
            next(iter(self.zero.averaged_gradients.values()))[0].view(-1)[0] = math.nan
        self.model.step()
        self._steps += finite

    def _swap(self) -> None:
        super()._swap()
        kept_whole = self.zero.persistent_parameters if self.stage == 3 and self._averages else ()
        if kept_whole:
            kept_whole[0].partition(kept_whole)
            kept_whole[0].all_gather(kept_whole)

    def forget_moments(self) -> None:
        super().forget_moments()
        self._steps = 0

    def optimizer_steps(self) -> int:
        return self._steps

    def shape(self, parameter: Any) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    def resident(self, parameter: Any) -> Part:
        if self.stage < 3:
            return super().resident(parameter)
        return self._valid(parameter, parameter.ds_tensor.detach())

    def _valid(self, parameter: Any, partition: torch.Tensor) -> Part:
        """A stage-3 partition without its padding."""
        size = self.shape(parameter).numel()
        first = min(partition.numel() * dist.get_rank(), size)
        return partition[: size - first], first

    def moments(self, parameter: Any) -> dict[str, Part]:
        if self._steps == 0 or not parameter.requires_grad:
            return {}
        if self.stage == 3:
            group, start, count = self.zero.grad_position[self.zero.get_param_id(parameter)]
            state = self.optimizers[0].state[self.zero.fp32_partitioned_groups_flat[group]]
            return {
                name: self._valid(parameter, state[name].narrow(0, start, count)) for name in ("exp_avg", "exp_avg_sq")
            }
        fragment = parameter._hp_mapping
        if fragment is None:
            return {}
        where = fragment.hp_fragment_address
        state = self.optimizers[0].state[self.zero.single_partition_of_fp32_groups[fragment.param_group_index]]
        return {
            name: (state[name].narrow(0, where.start, where.numel), fragment.lp_fragment_address.start)
            for name in ("exp_avg", "exp_avg_sq")
        }

    def share(self) -> dict[str, range]:
        return {name: self._range(parameter) for name, parameter in self.weights.named_parameters()}

    def _range(self, parameter: Any) -> range:
        if self.stage == 3:
            values, first = self.resident(parameter)
            return range(first, first + values.numel())
        if not parameter.requires_grad:
            return range(parameter.numel() if dist.get_rank() == 0 else 0)
        if parameter._hp_mapping is None:
            return range(0)
        where = parameter._hp_mapping.lp_fragment_address
        return range(where.start, where.start + where.numel)

    def _allocate_moments(self, steps: int) -> None:
        flats = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        for flat in flats:
            self.optimizers[0].state[flat] = empty_state(self.optimizers[0], flat, steps)
        self._steps = steps
