"""The contrastive loss over the whole global batch."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch.nn.functional import cross_entropy


def gather_with_gradient(embeds: torch.Tensor) -> torch.Tensor:
    """Collective. The embeddings of all processes, `(batch * world, dim)` in rank order; the backward pass sums the
    gradients that the processes have for each."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return embeds
    assert dist.group.WORLD is not None
    return collectives.all_gather_single_autograd(embeds.contiguous(), 0, dist.group.WORLD)


def contrastive_loss(image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Collective. Symmetric InfoNCE, fp32 `()`: this process's pairs against those of all processes.

    The mean over processes is the loss of the global batch, and the mean of its gradients, which every engine takes,
    is that loss's gradient: no factor of the world size anywhere.

    Args:
        image_embeds, text_embeds: `(batch, dim)`, of unit length, the same `batch` on every process.
        logit_scale: `(1,)`, as `FlipModel.forward` returns it.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        image_embeds, text_embeds, logit_scale = image_embeds.float(), text_embeds.float(), logit_scale.float()
        all_images, all_texts = gather_with_gradient(image_embeds), gather_with_gradient(text_embeds)
        first = dist.get_rank() * len(image_embeds) if len(all_images) > len(image_embeds) else 0
        target = torch.arange(first, first + len(image_embeds), device=image_embeds.device)
        by_image = cross_entropy(logit_scale * image_embeds @ all_texts.t(), target)
        by_text = cross_entropy(logit_scale * text_embeds @ all_images.t(), target)
        return (by_image + by_text) / 2
