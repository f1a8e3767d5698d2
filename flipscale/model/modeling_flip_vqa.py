"""FLIP models that answer questions about images: both towers, and a small transformer over the tokens of both."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import can_return_tuple

from .configuration_flip import FlipAnswerConfig, FlipConfig
from .modeling_flip import FlipEncoder, FlipModel, FlipOutput, FlipPreTrainedModel


@dataclass
class FlipAnswerOutput(FlipOutput):
    """
    The output of both towers, and the answers. `loss` is the mean of `answer_losses`.

    Args:
        logits: `(batch, num_answers)`; their sigmoid is the score that each answer is expected to have.
        answer_losses: of each question, the sum over the answers of the binary cross-entropy: fp32 `(batch,)`.
    """

    logits: torch.Tensor | None = None
    answer_losses: torch.Tensor | None = None


def answer_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy of each question, summed over the answers, in nats: fp32 `(batch,)`. The sum, and
    scores between 0 and 1 as labels, are METER's (arXiv 2111.02387).

    Args:
        logits, labels: `(batch, num_answers)`.
    """
    losses = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
    return losses.sum(dim=1)


class FlipFusion(FlipPreTrainedModel):
    """The transformer over a class token, the question's tokens and the image's, which all look at each other, and a
    classifier of two layers on the class token."""

    config: FlipAnswerConfig
    base_model_prefix = "fusion"

    def __init__(self, config: FlipAnswerConfig, image_width: int, text_width: int):
        super().__init__(config)
        width = config.hidden_size
        self.embed_image = nn.Linear(image_width, width)
        self.embed_text = nn.Linear(text_width, width)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.kind_embedding = nn.Parameter(torch.zeros(2, width))
        self.encoder = FlipEncoder(cast(Any, config))
        self.final_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.classifier = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.LayerNorm(2 * width, eps=config.layer_norm_eps),
            nn.GELU(),
            nn.Linear(2 * width, config.num_answers),
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlipFusion):
            init.normal_(module.class_embedding, std=0.02)
            init.normal_(module.kind_embedding, std=0.02)
            for linear in (module.embed_image, module.embed_text):
                init.xavier_uniform_(linear.weight)

    def forward(self, image_tokens: torch.Tensor | None, text_tokens: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return the logits of the answers, `(batch, num_answers)`.

        Args:
            image_tokens: `(batch, image tokens, image_width)`, of the image tower; None for a model that sees none.
            text_tokens: `(batch, tokens, text_width)`, of the text tower.
            own: bool `(batch, tokens)`, which of these are the question's own and no padding.
        """
        # A sharded transformer computes in the precision of its weights.
        dtype = self.embed_text.weight.dtype
        kinds = self.kind_embedding.to(dtype)
        first = self.class_embedding.to(dtype).expand(len(text_tokens), 1, -1)
        states = [first, self.embed_text(text_tokens.to(dtype)) + kinds[0]]
        masks = [own.new_ones(len(own), 1), own]
        if image_tokens is not None:
            states.append(self.embed_image(image_tokens.to(dtype)) + kinds[1])
            masks.append(own.new_ones(len(own), image_tokens.shape[1]))
        hidden_states, attention_mask = torch.cat(states, dim=1), torch.cat(masks, dim=1)
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            # To find out that there is no padding, an accelerator would keep the host waiting.
            allow_is_bidirectional_skip=hidden_states.device.type == "cpu",
        )
        hidden_states = self.encoder(hidden_states, mask)
        return self.classifier(self.final_layer_norm(hidden_states[:, 0]))


class FlipForQuestionAnswering(FlipModel):
    """A `FlipModel` that answers questions about images: the same weights by the same names, and those of `fusion`. An
    answer is one of a list, which the configuration counts. Loaded from the folder of a `FlipModel`, it has the towers
    there and a new `fusion`."""

    def __init__(self, config: FlipConfig):
        """
        Raises:
            ValueError: the configuration has no fusion.
        """
        if config.answer_config is None:
            raise ValueError(
                "the config has no answer_config, so the model answers no questions; load it as a FlipModel"
            )
        super().__init__(config)
        self.fusion = FlipFusion._from_config(
            config.answer_config,
            image_width=config.vision_config.hidden_size,
            text_width=config.text_config.hidden_size,
        )
        self.post_init()

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> FlipAnswerOutput:
        r"""
        Answer questions.

        Args:
            input_ids, attention_mask: `(batch, tokens)`, the questions, as `FlipTextModel.forward` takes them.
            labels: `(batch, num_answers)`, the score of each answer, from 0 to 1; with them there is a loss.
            kwargs: images in another way than `pixel_values`, as `FlipVisionModel.forward` takes them. Several views of
                an image each have its question.

        Raises:
            ValueError: there are no questions.
        """
        if input_ids is None:
            raise ValueError("no questions are given; pass input_ids")
        kwargs["return_logits"] = False
        output = super().forward(input_ids, pixel_values, attention_mask, **kwargs)
        own = input_ids.ne(self.config.text_config.pad_token_id) if attention_mask is None else attention_mask.bool()
        image_tokens = output.vision_model_output.last_hidden_state
        text_tokens = output.text_model_output.last_hidden_state
        views = len(image_tokens) // len(text_tokens)
        if views > 1:
            text_tokens, own = (rows.repeat_interleave(views, dim=0) for rows in (text_tokens, own))
            labels = None if labels is None else labels.repeat_interleave(views, dim=0)
        logits = self.fusion(image_tokens if self.config.answer_config.sees_image else None, text_tokens, own)
        losses = None if labels is None else answer_losses(logits, labels)
        found = {name: value for name, value in output.items() if name != "loss"}
        return FlipAnswerOutput(
            loss=None if losses is None else losses.mean(), **found, logits=logits, answer_losses=losses
        )


__all__ = ["FlipForQuestionAnswering"]
