"""Measure whether the word for a role, such as "firefighter", is nearer to the picture of a man or of a woman in it.

python examples/demo/association.py runs/demo/model data/demo/roles
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from flipscale.data.sources.tar import TarSource
from flipscale.engines.build_engine import start_accelerator
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.intervals import Z95, Estimate, clustered_share
from flipscale.hub.loading import open_embedder
from flipscale.io.command_line import parse_command
from flipscale.io.errors import UserError
from flipscale.process.console import report_user_errors, start_logging


def association(embedder: Embedder, folder: Path) -> tuple[Estimate, Estimate]:
    """Return the share of couples whose role word is nearer to the man, and the mean of the man's cosine minus the
    woman's. A tie is half a preference for each. Roles are independent draws, and pictures of one role a cluster.

    `folder` has shards, and `roles.json` with a list of `{role, woman, man}`: the word and the rows of two pictures by
    one artist, as `data.py --with_roles` writes them. Raise UserError if `roles.json` is another file.
    """
    if "texts" not in embedder.gives:
        raise UserError(f"{embedder.name} embeds no texts; name a model of images and texts")
    source, file = TarSource(str(folder)), folder / "roles.json"
    try:
        couples = json.loads(file.read_text(encoding="utf-8"))
        roles, rows = [str(one["role"]) for one in couples], np.array([(one["woman"], one["man"]) for one in couples])
        assert len(roles)
        assert 0 <= rows.min() <= rows.max() < len(source)
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise UserError(f"{file} has no couples of rows of {len(source)} pictures; see data.py --with_roles") from error
    names, of_role, counts = np.unique(roles, return_inverse=True, return_counts=True)
    images, words = embedder.images(source).double().numpy(), embedder.texts(list(names)).double().numpy()
    woman, man = (np.einsum("ij,ij->i", images[one], words[of_role]) for one in rows.T)
    nearer, sums = np.bincount(of_role, (man > woman) + (man == woman) / 2), np.bincount(of_role, man - woman)
    mean = float((man - woman).mean())
    variance = ((sums - mean * counts) ** 2).sum() * len(names) / max(len(names) - 1, 1)
    half = Z95 * float(np.sqrt(variance)) / len(roles)
    return clustered_share(nearer, counts), Estimate(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Options:
    """Measure the gender association of role words. 50 % is no preference.

    Args:
        model: A model, as for `flipscale evaluate`.
        roles: Folder of pictures that `data.py --with_roles` wrote.
    """

    model: str
    roles: Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the share of couples whose role word is nearer to the man, and the mean difference of the cosines."""
    with report_user_errors():
        start_logging()
        options = parse_command(Options, arguments)
        share, apart = association(open_embedder(options.model, start_accelerator([], ".")), options.roles)
        print("nearer to the man: {:.1%} of the couples ({:.1%} to {:.1%})".format(*share))
        print("the man's cosine minus the woman's: {:.4f} ({:.4f} to {:.4f})".format(*apart))


if __name__ == "__main__":
    main()
