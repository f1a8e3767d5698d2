"""FLIP models that answer questions about images: both towers, and a small transformer over their tokens."""

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
        logits: `(batch, num_answers)`; their sigmoid is the predicted score of each answer.
        answer_losses: fp32 `(batch,)`, the binary cross-entropy of each question, summed over the answers.
    """

    logits: torch.Tensor | None = None
    answer_losses: torch.Tensor | None = None


def answer_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy of each question, summed over the answers, in nats: fp32 `(batch,)`.

    Logits and labels are `(batch, num_answers)`. The sum, and labels that are scores from 0 to 1, follow METER (arXiv
    2111.02387).
    """
    losses = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
    return losses.sum(dim=1)


class FlipFusion(FlipPreTrainedModel):
    """A bidirectional transformer over a class token, the question's tokens and the image's tokens.

    A classifier of two layers reads the class token.
    """

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
            image_tokens: `(batch, image tokens, image_width)`, output of the image tower; None without images.
            text_tokens: `(batch, tokens, text_width)`, output of the text tower.
            own: bool `(batch, tokens)`, False for padding.
        """
        # The transformer may be sharded and then computes in the precision of its weights.
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
            # On an accelerator the host would wait for the check whether there is padding.
            allow_is_bidirectional_skip=hidden_states.device.type == "cpu",
        )
        hidden_states = self.encoder(hidden_states, mask)
        return self.classifier(self.final_layer_norm(hidden_states[:, 0]))


class FlipForQuestionAnswering(FlipModel):
    """A `FlipModel` with a `fusion` transformer that answers questions about images, with one of `num_answers` answers.

    Loaded from the folder of a `FlipModel`, it has that model's towers and a new `fusion`.
    """

    def __init__(self, config: FlipConfig):
        if config.answer_config is None:
            raise ValueError("the config has no answer_config, which answers need; load the model as a FlipModel")
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
            input_ids, attention_mask: `(batch, tokens)`, the questions, see `FlipTextModel.forward`.
            labels: `(batch, num_answers)`, the score of each answer, from 0 to 1; the output then has a loss.
            kwargs: images in other forms than `pixel_values`, see `FlipVisionModel.forward`. Views share a question.

        Raises:
            ValueError: there are no questions.
        """
        if input_ids is None:
            raise ValueError("input_ids is missing; give the questions")
        kwargs["return_logits"] = False
        output = super().forward(input_ids, pixel_values, attention_mask, **kwargs)
        own = input_ids.ne(self.config.text_config.pad_token_id) if attention_mask is None else attention_mask.bool()
        image_tokens = output.vision_model_output.last_hidden_state
        text_tokens = output.text_model_output.last_hidden_state
        own = own[:, : text_tokens.shape[1]]
        views = len(image_tokens) // len(text_tokens)
        if views > 1:
            text_tokens, own = (rows.repeat_interleave(views, dim=0) for rows in (text_tokens, own))
            labels = None if labels is None else labels.repeat_interleave(views, dim=0)
        logits = self.fusion(image_tokens if self.config.answer_config.sees_image else None, text_tokens, own)
        losses = None if labels is None else answer_losses(logits, labels)
        towers = {name: value for name, value in output.items() if name != "loss"}
        mean = None if losses is None else losses.mean()
        return FlipAnswerOutput(loss=mean, **towers, logits=logits, answer_losses=losses)
