"""The card of a model that was converted for another program: how to load it, its base model and its licence."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from flipscale.io.model_folder import local_folder
from flipscale.io.text_table import escape_markdown


def derived_card(src: str, name: str, library: str, text: str) -> str:
    """Return the card, as Markdown, of `name`: the model folder or Hub name `src`, converted for `library`.

    The licence is copied from the card of `src`, if that has one.
    """
    data = ModelCardData(
        library_name=library,
        license=_licence(src),
        pipeline_tag="zero-shot-image-classification",
        tags=["flip", "clip", "flipscale"],
        base_model=None if Path(src).exists() else src,
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {escape_markdown(name)}\n\n{text}"


def _licence(src: str) -> str | None:
    try:
        # A folder may have no card, and the Hub may be out of reach.
        folder = local_folder(src)
        return ModelCard.load(src if folder is None else folder / "README.md").data.license
    except (OSError, ValueError, YAMLError):
        return None
