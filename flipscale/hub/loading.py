"""Load a model folder or Hub name, or another program's model, with one clear error if that fails."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flipscale.engines.device import best_attention
from flipscale.evaluation.embedders import open_clip, transformers_model
from flipscale.evaluation.embedders.open_clip import open_clip_embedder
from flipscale.evaluation.embedders.plain import PLAIN, UNTRAINED, plain_embedder, untrained_embedder
from flipscale.evaluation.embedders.transformers_model import transformers_embedder
from flipscale.evaluation.embedding import Embedder
from flipscale.model import FlipModel

if TYPE_CHECKING:
    from accelerate import Accelerator

# Models that are not ours, by what their names begin with.
OTHERS: dict[str, Callable[..., Embedder]] = {
    open_clip.PREFIX: open_clip_embedder,
    transformers_model.PREFIX: transformers_embedder,
    UNTRAINED: untrained_embedder,
}


def load_flip(name: str) -> tuple[FlipModel, PreTrainedTokenizerBase]:
    """Return the model, in evaluation mode, and the tokenizer of a model folder or Hub name.

    Nothing is unpickled, and none of the folder's code is run.

    Raises:
        ValueError: it is missing, incomplete, of a newer version or saved only as a pickle, its weights do not fit its
            config, or it has no tokenizer.
    """
    try:
        model, report = FlipModel.from_pretrained(name, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"model {name!r} cannot be loaded ({_first_line(error)})") from error
    for what in ("missing_keys", "unexpected_keys"):
        if report[what]:
            raise ValueError(
                f"model {name!r} cannot be loaded (the weights are not those of its config: {len(report[what])} "
                f"{what.replace('_', ' ')}, such as {min(report[what])}); download or export it again"
            )
    try:
        return model.eval(), AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model {name!r} has no tokenizer that can be read ({_first_line(error)}); it needs tokenizer.json and "
            "tokenizer_config.json: copy those it was trained with, or export it again"
        ) from error


def open_embedder(name: str, accelerator: "Accelerator", batch_size: int = 256, num_workers: int = 0) -> Embedder:
    """Return the embedder of a model: a folder or Hub name of ours, `open_clip:NAME,PRETRAINED`, or `hf:NAME`; or, to
    compare with, of `pixels`, `hog` or `untrained:FOLDER`, which has random weights.

    Raises:
        ValueError: it cannot be loaded.
    """
    if name in PLAIN:
        return plain_embedder(name, accelerator, batch_size, num_workers)
    for prefix, other in OTHERS.items():
        if name.startswith(prefix):
            return other(name.removeprefix(prefix), accelerator, batch_size, num_workers)
    model, tokenizer = load_flip(name)
    model.set_attn_implementation(best_attention(accelerator.device))
    return Embedder(model.to(accelerator.device), tokenizer, accelerator, batch_size, num_workers, name=name)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
