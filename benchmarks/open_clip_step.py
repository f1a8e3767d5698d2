"""A training step of open_clip's CLIP, in each way in which its trainers compile and shard it."""

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from flipscale.checks.node import Row
from flipscale.engines.optimizers import build_optimizers, set_learning_rate
from flipscale.model import FlipConfig
from flipscale.recipe.optim import OptimRecipe

# What is compiled: blocks one by one, as ours, or what `--torchcompile-strategy` names; `fsdp2` is its `--fsdp`.
WAYS = ("blocks", "model", "task", "step", "fsdp2")
_OF_ITS_TASK = ("task", "step", "fsdp2")
_LEARNING_RATE = 1e-6


def missing(way: str, world: int) -> str:
    """Return what a way needs and does not have here; empty if it can run."""
    if find_spec("open_clip") is None:
        return "open_clip is absent; `pip install git+https://github.com/mlfoundations/open_clip`"
    if way in _OF_ITS_TASK and find_spec("open_clip.task") is None:
        return "this release of open_clip has no open_clip.task; its main has"
    return "it needs 2 GPUs" if way == "fsdp2" and world == 1 else ""


def open_clip_step(
    config: FlipConfig,
    image_size: int | None,
    batch_size: int,
    mask_ratio: float,
    device: torch.device,
    bf16: bool,
    way: str | None,
) -> Callable[[], None]:
    """Collective. Return a training step of open_clip's CLIP with the same widths, layers, heads and lengths, as its
    trainer takes it: model and loss under autocast, patch dropout as mask. Several processes have its FSDP2, or DDP
    with a static graph, and a local loss with gathered gradients. `way` is one of WAYS; None compiles nothing.
    `image_size` is a stage's, by default the model's. AdamW is fused, as ours; in the way `step` it is compiled.

    The step gets whole images in fp32, the format of its loader, which are on the device already.
    """
    from open_clip.loss import ClipLoss

    torch._dynamo.config.optimize_ddp = False  # as in our trainer; a block has two graphs otherwise
    world = dist.get_world_size() if dist.is_initialized() else 1
    gathered: Row = {}
    if world > 1:
        gathered = {"local_loss": True, "gather_with_grad": True, "rank": dist.get_rank(), "world_size": world}
    model = _clip(config, image_size, mask_ratio, device)
    batch = _batch(config, image_size, batch_size, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16 and way != "fsdp2")
    if way in _OF_ITS_TASK:
        from open_clip.task import CLIPTask

        task = CLIPTask(model, **gathered, device=device, verbose=False)
        if way == "fsdp2":
            policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32)
            task.prepare_fsdp(mp_policy=policy, compile_blocks=True)
        elif world > 1:
            task.prepare_distributed(static_graph=True)
        if way == "task":
            task.compile(target="task")
        model = task.trainable_module

        def loss_of_batch() -> torch.Tensor:
            return task(batch)[0]["loss"]
    else:
        blocks = (*model.visual.transformer.resblocks, *model.transformer.resblocks)
        for block in blocks if way == "blocks" else ():
            block.compile()
        called, clip_loss = torch.compile(model) if way == "model" else model, ClipLoss(**gathered)
        if world > 1:
            called = DistributedDataParallel(called, static_graph=True)

        def loss_of_batch() -> torch.Tensor:
            return clip_loss(**called(**batch))

    if way == "step":
        rate = torch.tensor(_LEARNING_RATE, device=device)  # a number would be compiled in
        optimizers: list[Any] = [torch.optim.AdamW(model.parameters(), rate, weight_decay=0.2)]
    else:
        optimizers = build_optimizers(model, OptimRecipe())
        set_learning_rate(optimizers, _LEARNING_RATE)

    def update() -> None:
        with autocast:
            loss = loss_of_batch()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    whole = torch.compile(update) if way == "step" else update
    (scale,) = (weight for name, weight in model.named_parameters() if name.endswith("logit_scale"))

    def step() -> None:
        torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default, which open_clip leaves as it is
        whole()
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.no_grad():
            scale.clamp_(0, math.log(100))

    return step


def _clip(config: FlipConfig, image_size: int | None, mask_ratio: float, device: torch.device) -> Any:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision, text = config.vision_config, config.text_config

    def sizes(tower: Any) -> Row:
        ratio = tower.intermediate_size / tower.hidden_size
        return {"layers": tower.num_hidden_layers, "width": tower.hidden_size, "mlp_ratio": ratio}

    head_width, length = vision.hidden_size // vision.num_attention_heads, text.max_position_embeddings
    size = image_size or vision.image_size
    pixels = {"patch_size": vision.patch_size, "image_size": size, "patch_dropout": mask_ratio}
    words = {"context_length": length, "vocab_size": text.vocab_size, "heads": text.num_attention_heads}
    towers = CLIPVisionCfg(**sizes(vision), **pixels, head_width=head_width), CLIPTextCfg(**sizes(text), **words)
    with device:
        model = CLIP(vision.projection_dim, *towers, output_dict=True)
    return model.train()  # patch dropout does nothing in eval mode


def _batch(
    config: FlipConfig, image_size: int | None, batch_size: int, device: torch.device
) -> dict[str, torch.Tensor]:
    vision, text = config.vision_config, config.text_config
    size = image_size or vision.image_size
    images = torch.randn(batch_size, vision.num_channels, size, size, device=device)
    captions = torch.randint(1, text.vocab_size, (batch_size, text.max_position_embeddings), device=device)
    return {"image": images, "text": captions}
