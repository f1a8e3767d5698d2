"""A model folder or Hub name, loaded with one clear error where it cannot be."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flipscale.model import FlipModel


def load_flip(name: str) -> tuple[FlipModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and the tokenizer of a model folder or Hub name; nothing is unpickled.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        model = FlipModel.from_pretrained(name, use_safetensors=True).eval()
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name!r} cannot be loaded ({str(error).splitlines()[0]})") from error
