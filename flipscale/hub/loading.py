"""Load a model folder or Hub name, or another program's model, with one clear error if that fails."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flipscale.data.tokenizers import check_tokenizer
from flipscale.engines.device import best_attention
from flipscale.engines.first_weights import model_without_storage
from flipscale.evaluation.baselines import PLAIN, UNTRAINED, plain_embedder, untrained_embedder
from flipscale.evaluation.embedding import ClassifierEmbedder, Embedder, dummy_batch
from flipscale.evaluation.foreign_models import OPEN_CLIP, TRANSFORMERS, open_clip_embedder, transformers_embedder
from flipscale.io.digests import check_weight
from flipscale.io.errors import UserError
from flipscale.io.model_folder import Header, check_folder, fetch_folder, read_header, read_object
from flipscale.io.quiet import without_bars
from flipscale.model import (
    FlipConfig,
    FlipForConditionalGeneration,
    FlipForImageClassification,
    FlipForQuestionAnswering,
    FlipModel,
    FlipPreTrainedModel,
)
from flipscale.objectives.captioning import CaptioningFlipModel

if TYPE_CHECKING:
    from accelerate import Accelerator

_log = logging.getLogger(__name__)

# What models without a text tower are evaluated by.
_TASKS: dict[type, str] = {FlipForImageClassification: "classification", FlipForConditionalGeneration: "captioning"}
# Models that are not ours, by what their names begin with.
OTHERS: dict[str, Callable[..., Embedder]] = {
    OPEN_CLIP: open_clip_embedder,
    TRANSFORMERS: transformers_embedder,
    UNTRAINED: untrained_embedder,
}


def load_flip(name: str) -> tuple[FlipModel, PreTrainedTokenizerBase]:
    """Return the model, in evaluation mode, and the tokenizer of a model folder or Hub name, as `load_model` does.

    Raises:
        ValueError: it is missing, incomplete, of a newer version or saved only as a pickle, its weights do not fit its
            config or are not finite, it has no tokenizer that fits, or it has no text tower.
        OSError: the Hub cannot be reached.
    """
    folder, model = load_model(name)
    if not isinstance(model, FlipModel):
        raise UserError(
            f"model {name!r} is a {type(model).__name__}, which has no text tower; `flipscale evaluate` takes it, with "
            f"--task '{{kind: {_TASKS[type(model)]}, data: TEST_SET}}'"
        )
    return model, _tokenizer_of(folder, name, model.config)


def _tokenizer_of(folder: Path, name: str, config: FlipConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises any
        raise UserError(
            f"model {name!r} has no tokenizer that can be read ({_first_line(error)}); it needs tokenizer.json and "
            "tokenizer_config.json: copy those it was trained with, or export it again"
        ) from error
    check_tokenizer(tokenizer, config.caption_config)
    return tokenizer


def load_model(name: str) -> tuple[Path, FlipPreTrainedModel]:
    """Return the folder of a model, a model folder or Hub name, and the model in evaluation mode: a `FlipModel`, with a
    decoder where it has learned captions too, a captioner without text tower, or the classifier of a fine-tuning.

    Nothing is unpickled, and none of the folder's code is run. Of its configuration only the fields are read that say
    what the model is.

    Raises:
        ValueError: it is missing, incomplete, of a newer version or saved only as a pickle, or its weights do not fit
            its config or are not finite.
        OSError: the Hub cannot be reached.
    """
    kind: type[FlipPreTrainedModel] = FlipModel
    try:
        folder = fetch_folder(name)
        files = check_folder(folder)
        content = read_object(folder / "config.json")
        config = FlipConfig.from_own_fields(content)
        if content.get("architectures") == [FlipForImageClassification.__name__]:
            kind, config.id2label = FlipForImageClassification, _class_names(content)
        elif config.answer_config is not None:
            kind = FlipForQuestionAnswering
        elif config.decoder_config is not None:
            kind = FlipForConditionalGeneration if config.text_config is None else CaptioningFlipModel
        _refuse_other_weights(config, {n: entry for file in files for n, entry in read_header(file).items()}, kind)
        weights = {n: weight for file in files for n, weight in load_file(file).items()}
        for weight_name, weight in weights.items():
            check_weight(weight_name, weight)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"model {name!r} cannot be loaded ({error})") from error
    with without_bars():
        return folder, kind.from_pretrained(None, config=config, state_dict=weights).eval()


def _class_names(content: dict[str, Any]) -> dict[int, str]:
    """Return the names of a classifier's classes, by their numbers.

    Raises:
        ValueError: the config has no such names.
    """
    names = content.get("id2label")
    if not isinstance(names, dict) or set(names) != {str(number) for number in range(len(names))}:
        raise UserError("its config.json has no id2label that counts its classes from 0; export it again")
    return {number: str(names[str(number)]) for number in range(len(names))}


def _refuse_other_weights(config: FlipConfig, stored: Header, kind: type[FlipPreTrainedModel]) -> None:
    """Raise if weights are not those of a configuration, before any of them is in memory.

    Raises:
        ValueError: weights are missing, too many or of another shape.
    """
    expected = {name: list(weight.shape) for name, weight in model_without_storage(config, kind).state_dict().items()}
    for what, names in (
        ("missing", expected.keys() - stored.keys()),
        ("unexpected", stored.keys() - expected.keys()),
        ("misshapen", {name for name in expected.keys() & stored.keys() if expected[name] != stored[name]["shape"]}),
    ):
        if names:
            name = min(names)
            about = f" of shape {stored[name]['shape']}, not {expected[name]}" if what == "misshapen" else ""
            raise UserError(
                f"the weights are not those of its config: {len(names)} {what} keys, such as {name}{about}; download "
                "or export it again"
            )


def open_embedder(name: str, accelerator: "Accelerator", batch_size: int = 256, num_workers: int = 0) -> Embedder:
    """Return the embedder of a model: a folder or Hub name of ours, `open_clip:NAME,PRETRAINED`, or `hf:NAME`; or, to
    compare with, of `pixels`, `hog` or `untrained:FOLDER`, which has random weights. It has embedded a text and an
    image.

    Raises:
        ValueError: it cannot be loaded, or does not embed.
        OSError: the Hub cannot be reached.
    """
    if name in PLAIN:
        return plain_embedder(name, accelerator, batch_size, num_workers)
    for prefix, other in OTHERS.items():
        if name.startswith(prefix):
            embedder = other(name.removeprefix(prefix), accelerator, batch_size, num_workers)
            try:
                for weight_name, weight in embedder.model.named_parameters():
                    check_weight(weight_name, weight)
            except ValueError as error:
                raise UserError(f"model {name!r} cannot be loaded ({error})") from error
            return _tried(embedder)
    model, tokenizer = load_with_tokenizer(name)
    model.set_attn_implementation(best_attention(accelerator.device))
    kind = ClassifierEmbedder if tokenizer is None else Embedder
    return _tried(kind(model.to(accelerator.device), tokenizer, accelerator, batch_size, num_workers, name=name))


def load_with_tokenizer(name: str) -> tuple[FlipPreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return a model with its tokenizer, or a classifier without one, as `load_flip` and `load_model`."""
    folder, model = load_model(name)
    return model, None if isinstance(model, FlipForImageClassification) else _tokenizer_of(folder, name, model.config)


class OpenModels:
    """The models of a command, opened one after the other. One that cannot be opened leaves the others their results.

    Args:
        asked: how many there are.
        open_one: what opens one of them, by its name.
    """

    def __init__(self, asked: int, open_one: Callable[[str], Embedder]):
        self._asked, self._open_one = asked, open_one
        self._faults: list[ValueError | OSError] = []

    def open(self, name: str) -> Embedder | None:
        """Collective. Return the embedder of a model, None on every process if any cannot open it.

        Raises:
            ValueError, OSError: it cannot be opened, and is the only model.
        """
        from accelerate.utils import gather_object

        embedder, faults = None, []
        try:
            embedder = self._open_one(name)
        except (ValueError, OSError) as error:
            if self._asked == 1:
                raise
            faults = [(isinstance(error, OSError), str(error))]
        faults = gather_object(faults)
        if not faults:
            return embedder
        is_os_error, told = faults[0]
        self._faults.append(OSError(told) if is_os_error else UserError(told))
        _log.warning("%s; the other models are evaluated", told)
        return None

    def raise_faults(self) -> None:
        """Raise if a model could not be opened, once the others are done.

        Raises:
            ValueError, OSError: as the first one's.
        """
        if self._faults:
            told = "; ".join(map(str, self._faults))
            kind = type(self._faults[0])
            raise kind(f"{len(self._faults)} of {self._asked} models were not evaluated: {told}")


def _tried(embedder: Embedder) -> Embedder:
    """Return the embedder, once it has embedded a text and an image.

    Raises:
        ValueError: it cannot, or what it gives are no numbers.
    """
    try:
        with torch.no_grad(), embedder.accelerator.autocast():
            found = {
                "an image": embedder.image_features(**dummy_batch(embedder.decoder()).to(embedder.accelerator.device))
            }
            if embedder.tokenizer is not None and "texts" in embedder.gives:
                tokens = embedder.tokens(["a photo"]).to(embedder.accelerator.device)
                found["a text"] = embedder.text_features(tokens)
    except Exception as error:  # its tokenizer, its processor or its model: any
        raise UserError(f"model {embedder.name!r} cannot embed ({_first_line(error)}); download it again") from error
    for what, features in found.items():
        if not features.isfinite().all():
            raise UserError(f"model {embedder.name!r} embeds {what} as numbers that are NaN or infinite; use another")
    return embedder


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
