"""transformers' common tests for each FLIP model, which `test_common` runs."""

import copy
import random
import unittest
from typing import Any, ClassVar

import torch
from model import transformers_tests

from flipscale.model import (
    FlipConfig,
    FlipDecoderConfig,
    FlipForConditionalGeneration,
    FlipModel,
    FlipTextConfig,
    FlipTextModel,
    FlipTextModelWithProjection,
    FlipVisionConfig,
    FlipVisionModel,
    FlipVisionModelWithProjection,
)

modeling, configuration = transformers_tests.load()

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads")
OTHERS: dict[str, Any] = {"intermediate_size": 37, "attention_dropout": 0.1, "initializer_range": 0.02}


class VisionTester:
    """64 patches and the class token."""

    batch_size, image_size, patch_size, num_channels, hidden_size = 12, 16, 2, 3, 32
    num_hidden_layers, num_attention_heads, is_training = 2, 4, False
    seq_length = (image_size // patch_size) ** 2 + 1

    def __init__(self, parent: unittest.TestCase, **kwargs: Any):
        self.parent = parent
        vars(self).update(kwargs)

    def get_config(self) -> FlipVisionConfig:
        names = ("image_size", "patch_size", "num_channels", *SHAPE)
        return FlipVisionConfig(**OTHERS, projection_dim=32, **{name: getattr(self, name) for name in names})

    def prepare_config_and_inputs_for_common(self) -> tuple[FlipVisionConfig, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": modeling.floats_tensor(shape)}


class TextTester:
    """7 tokens of at most 16, so that the model pads."""

    batch_size, seq_length, vocab_size, hidden_size = 12, 7, 99, 32
    num_hidden_layers, num_attention_heads, is_training = 2, 4, False
    max_position_embeddings = 16

    def __init__(self, parent: unittest.TestCase, **kwargs: Any):
        self.parent = parent
        self.attend_to_padding = True
        vars(self).update(kwargs)

    def get_config(self) -> FlipTextConfig:
        names = ("vocab_size", "max_position_embeddings", "attend_to_padding", *SHAPE)
        return FlipTextConfig(**OTHERS, projection_dim=32, **{name: getattr(self, name) for name in names})

    def prepare_config_and_inputs_for_common(self) -> tuple[FlipTextConfig, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.seq_length]
        lengths = torch.randint(1, self.seq_length, (self.batch_size, 1))
        mask = (torch.arange(self.seq_length)[None] < lengths).long()
        return self.get_config(), {"input_ids": modeling.ids_tensor(shape, self.vocab_size), "attention_mask": mask}


class BothTester:
    is_training = True

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.text_model_tester, self.vision_model_tester = TextTester(parent), VisionTester(parent)
        self.batch_size = self.text_model_tester.batch_size

    def get_config(self) -> FlipConfig:
        return FlipConfig(
            text_config=self.text_model_tester.get_config().to_dict(),
            vision_config=self.vision_model_tester.get_config().to_dict(),
            projection_dim=64,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[FlipConfig, dict[str, Any]]:
        text = self.text_model_tester.prepare_config_and_inputs_for_common()[1]
        vision = self.vision_model_tester.prepare_config_and_inputs_for_common()[1]
        return self.get_config(), {**text, **vision, "return_loss": True}


class Common(modeling.ModelTesterMixin):
    """A model's tests. A tower has no loss, so its testers are not `is_training`."""

    config_class: ClassVar[type] = FlipConfig
    has_text_modality: ClassVar[bool] = False
    config_options: ClassVar[dict[str, Any]] = {"hidden_size": 48}

    def setUp(self) -> None:
        # Seldom, random weights and inputs are such that bf16 exceeds a common test's tolerance.
        for seed in (random.seed, modeling.global_rng.seed, torch.manual_seed):
            seed(0)
        self.config_tester = configuration.ConfigTester(
            self, config_class=self.config_class, has_text_modality=self.has_text_modality, **self.config_options
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class FlipVisionModelTest(Common, unittest.TestCase):
    all_model_classes = (FlipVisionModel, FlipVisionModelWithProjection)
    config_class = FlipVisionConfig
    test_resize_embeddings = False

    def setUp(self) -> None:
        super().setUp()
        self.model_tester = VisionTester(self)

    def test_model_get_set_embeddings(self) -> None:
        """The common test asks for a token embedding; the image tower's input layer is a patch embedding."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            assert model.get_input_embeddings().weight.shape == (32, 3, 2, 2)


class FlipTextModelTest(Common, unittest.TestCase):
    all_model_classes = (FlipTextModel, FlipTextModelWithProjection)
    config_class, has_text_modality = FlipTextConfig, True

    def setUp(self) -> None:
        super().setUp()
        self.model_tester = TextTester(self)


class FlipCleanTextModelTest(FlipTextModelTest):
    def setUp(self) -> None:
        super().setUp()
        self.model_tester = TextTester(self, attend_to_padding=False)


class CaptionTester:
    """A captioner without a text tower: 6 tokens of at most 16, and 64 patches."""

    is_training = True
    seq_length = decoder_seq_length = 6
    has_targets = True  # captions, which have a loss
    encoder_seq_length = VisionTester.seq_length
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 120

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.vision_model_tester = VisionTester(parent)
        self.batch_size = self.vision_model_tester.batch_size

    def get_config(self) -> FlipConfig:
        shape = {name: getattr(self, name) for name in ("vocab_size", *SHAPE)}
        tokens = {"max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
        decoder = FlipDecoderConfig(**OTHERS, **shape, **tokens, num_encoder_layers=1)
        return FlipConfig(vision_config=self.vision_model_tester.get_config(), decoder_config=decoder)

    def prepare_config_and_inputs_for_common(self) -> tuple[FlipConfig, dict[str, Any]]:
        vision = self.vision_model_tester.prepare_config_and_inputs_for_common()[1]
        ids = modeling.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        targets = {"input_ids": ids} if self.has_targets else {}
        return self.get_config(), {**vision, **targets, "decoder_input_ids": ids.clone()}


class FlipForConditionalGenerationTest(Common, transformers_tests.generation_mixin(), unittest.TestCase):
    all_model_classes = (FlipForConditionalGeneration,)
    all_generative_model_classes = (FlipForConditionalGeneration,)
    config_options: ClassVar[dict[str, Any]] = {"common_properties": ["projection_dim"]}
    _is_composite = is_encoder_decoder = True
    # The class does not take the cache by its earlier name, `past_key_values`.
    test_bc_cache_name_forward = None
    # Tower and decoder are siblings, so no inner model is this one without its head.
    test_model_base_model_prefix = None
    # A caption needs an image.
    test_generate_without_input_ids = None
    # They count outputs. Targets add the loss and remove the cache.
    without_targets = ("test_attention_outputs", "test_generate_continue_from_past_key_values")

    def setUp(self) -> None:
        super().setUp()
        self.model_tester = CaptionTester(self)
        self.model_tester.has_targets = self._testMethodName not in self.without_targets

    def prepare_config_and_inputs_for_generate(self, batch_size: int = 2) -> tuple[FlipConfig, dict[str, Any]]:
        """Return images without captions, because captions are prompts and the tests count tokens from the begin."""
        self.model_tester.has_targets = False
        return super().prepare_config_and_inputs_for_generate(batch_size)

    def _check_generate_outputs(self, output: Any, config: FlipConfig, **options: Any) -> None:
        """Check with the decoder's configuration, because a captioner has no text tower."""
        decoder_config = copy.deepcopy(config.decoder_config)
        decoder_config.is_encoder_decoder = True
        super()._check_generate_outputs(output, decoder_config, **options)


class FlipModelTest(Common, unittest.TestCase):
    all_model_classes = (FlipModel,)
    config_options: ClassVar[dict[str, Any]] = {"common_properties": ["projection_dim", "logit_scale_init_value"]}
    additional_model_inputs: ClassVar[list[str]] = ["pixel_values"]
    _is_composite = True
    # The towers' own tests check these outputs.
    test_attention_outputs = test_hidden_states_output = test_retain_grad_hidden_states_attentions = None

    def setUp(self) -> None:
        super().setUp()
        self.model_tester = BothTester(self)
