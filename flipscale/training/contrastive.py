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

    With several views of each image it is the mean over views of the loss of that view's images and all texts: every
    view is paired with its caption, and no view is a negative of its siblings.

    Args:
        image_embeds: `(batch * views, dim)`, of unit length, the views of an image in a row.
        text_embeds: `(batch, dim)`, of unit length, the same `batch` on every process.
        logit_scale: `(1,)`, as `FlipModel.forward` returns it.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        image_embeds, text_embeds, logit_scale = image_embeds.float(), text_embeds.float(), logit_scale.float()
        all_images, all_texts = gather_with_gradient(image_embeds), gather_with_gradient(text_embeds)
        first = dist.get_rank() * len(text_embeds) if len(all_texts) > len(text_embeds) else 0
        target = torch.arange(first, first + len(text_embeds), device=text_embeds.device)
        losses = []
        for images, others in zip(_by_view(image_embeds, text_embeds), _by_view(all_images, all_texts), strict=True):
            by_image = cross_entropy(logit_scale * images @ all_texts.t(), target)
            by_text = cross_entropy(logit_scale * text_embeds @ others.t(), target)
            losses.append((by_image + by_text) / 2)
        return torch.stack(losses).mean()


def _by_view(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The first view of every image, `(texts, dim)`, then the second, and so on."""
    return image_embeds.unflatten(0, (len(text_embeds), -1)).unbind(1)
