"""Load a model folder or Hub name, with one clear error if that fails."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flipscale.model import FlipModel


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
