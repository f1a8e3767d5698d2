"""Push a model to the Hub: `flipscale push runs/NAME ORG/NAME`."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.options import CountOrZero
from flipscale.process.console import start_logging

# The place of a model in a call of a card that loads it.
_LOADED = re.compile(r'(?:\bmodel=|\w+\()"(?:local-dir:)?((?:[^"\\\n]|\\.)+)"')


@dataclass(frozen=True)
class Push:
    """Upload a trained model to the Hugging Face Hub.

    Args:
        run_dir: A run directory, whose model/ is uploaded, or a model folder.
        repo: Name of the model on the Hub, ORG/NAME, created if it does not exist.
        step: Upload the model of the checkpoint of this step.
        private: Create a private model.
        revision: Branch to upload to, created if it does not exist. Default: main.
        dry_run: Print the files to upload, without using the network.
    """

    run_dir: Path
    repo: str
    _: KW_ONLY
    step: CountOrZero | None = None
    private: bool = False
    revision: str | None = None
    dry_run: bool = False

    def run(self) -> None:
        """Push a model and print its URL. If the Hub has the same files, nothing is uploaded."""
        from flipscale.hub.push import Target, check_to_push, left_out, push_folder, split_own_files

        target = Target(self.repo, self.private or None, self.revision)
        title = self.run_dir.resolve().name + ("" if self.step is None else f", step {self.step}")
        start_logging()
        with _model_folder(self.run_dir, self.step) as folder:
            check_to_push(folder)
            if self.step is not None or not self.dry_run:
                is_run = (self.run_dir / "recipe.yaml").is_file() or folder.resolve().name != "model"
                _update_card(folder, self.run_dir if is_run else folder.resolve().parent, self.repo, self.step)
            if self.dry_run:
                files = {name: (folder / name).stat().st_size for name in split_own_files(folder)[0]}
                print("\n".join(f"{size:>16,}  {name}" for name, size in files.items()))
                if others := left_out(folder):
                    print(others)
                print(f"{sum(files.values()):>16,}  bytes in {len(files)} files of {title} would go to {target}")
                return
            url, commit = push_folder(folder, target, title)
        print(f"{url}: {f'commit {commit}' if commit else 'nothing new, nothing uploaded'}")


def _update_card(folder: Path, run_dir: Path, repo_id: str, step: int | None) -> None:
    """Put the model's Hub name into its card: rewrite a run's card, or replace the folder's name in another card. Put
    it into open_clip's configuration too, by which open_clip finds the tokenizer."""
    from flipscale.hub.card import escape_string, write_card
    from flipscale.io.model_folder import read_object

    card = folder / "README.md"
    if card.is_symlink():
        return
    config = folder / "open_clip_config.json"
    if config.is_file() and not config.is_symlink() and (folder / "tokenizer_config.json").is_file():
        content = read_object(config)
        content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = repo_id
        write_text(config, json.dumps(content, indent=2) + "\n")
    if (run_dir / "recipe.yaml").is_file():
        write_card(folder, run_dir, repo_id, step)
    elif card.is_file():
        try:
            text = card.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{card} is not UTF-8 ({error.reason}); write it again") from error
        # The card may name the folder by another path, from where it was written.
        names = {folder.resolve().name, escape_string(folder.resolve().name)}
        loaded = [place for place in _LOADED.findall(text) if Path(place).absolute().name in names]
        for place in {escape_string(folder), *loaded}:
            text = text.replace(f'"{place}"', f'"{repo_id}"').replace(f'"local-dir:{place}"', f'"hf-hub:{repo_id}"')
        write_text(card, text)


@contextmanager
def _model_folder(run_dir: Path, step: int | None) -> Iterator[Path]:
    """Yield the model folder of a run, `run_dir` itself if it is a model folder, or the export of a checkpoint."""
    if step is not None:
        from flipscale.engines.checkpoint import checkpoint_of
        from flipscale.hub.export import export_checkpoint
        from flipscale.hub.push import export_folder

        folder = export_folder(run_dir, step)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            yield export_checkpoint(checkpoint_of(run_dir, step), folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    for folder in (run_dir / "model", run_dir):
        if any((folder / name).is_file() for name in ("config.json", "open_clip_config.json")):
            yield folder
            return
    raise UserError(
        f"{run_dir} has no model to push: neither {run_dir}/model/config.json nor {run_dir}/config.json exists; "
        "finish the run, or name a checkpoint with --step"
    )
