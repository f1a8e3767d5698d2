"""Find pictures by words: the nearest pictures of a folder to each query, as a page to open in a browser."""

import argparse
from pathlib import Path
from typing import Any

from flipscale.io.errors import UserError
from flipscale.io.files import check_writable, is_utf8
from flipscale.io.options import Count, number

_MOST_QUERIES = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale search`."""
    parser.add_argument("model", metavar="MODEL", help="A model, named as `flipscale evaluate` takes it.")
    parser.add_argument(
        "pictures",
        metavar="FOLDER",
        help="A folder that has pictures in it or below it, or shards: a folder of *.tar, a glob, or a range.",
    )
    parser.add_argument(
        "queries",
        metavar="QUERY",
        nargs="*",
        help="What to look for: words, such as 'two arrows in a circle', or a picture file, for pictures like it.",
    )
    parser.add_argument("--queries", dest="file", metavar="FILE", type=Path, help="A text file of queries, one a line.")
    parser.add_argument(
        "--out",
        metavar="PAGE",
        type=Path,
        default=Path("search.html"),
        help="The page to write; search.html by default. The embeddings are kept beside it, in PAGE with .npz at its "
        "end, for the next search of the same pictures.",
    )
    parser.add_argument("--top", type=number(Count), default=8, help="How many pictures a query shows; 8 by default.")


def run(args: argparse.Namespace) -> None:
    """Embed the pictures, look for the queries, and write the page.

    Raises:
        ValueError: there is no query or no picture, the model cannot be loaded, or the page cannot be written there.
        OSError: the disk is full.
    """
    queries = _queries(args)
    _check_page(args.out)
    from flipscale.pages.library import open_pictures

    pictures = open_pictures(args.pictures)
    from flipscale.engines.start import start_accelerator
    from flipscale.evaluation.reports.record import data_name
    from flipscale.hub.loading import open_embedder
    from flipscale.pages.search_page import as_lines, embedded_pictures, searches, write_search_page

    accelerator = start_accelerator([], ".")
    if not accelerator.is_main_process:
        return
    embedder: Any = open_embedder(args.model, accelerator)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = embedded_pictures(embedder, pictures, args.out.with_suffix(".npz"))
    if found.faults:
        print(f"{len(found.faults)} of {len(pictures)} pictures are damaged and left out, the first: {found.faults[0]}")
    results = searches(embedder, found, queries, args.top)
    model = data_name(str(Path(args.model).parent) if Path(args.model).name == "model" else args.model)
    write_search_page(args.out, pictures, found, results, model, data_name(args.pictures))
    print("\n".join(as_lines(results[:5], pictures)))
    count = f"{len(results)} {'query' if len(results) == 1 else 'queries'}"
    print(f"{args.out}: {count} over {len(found.rows):,} pictures; open it in a browser")


def _queries(args: argparse.Namespace) -> list[str]:
    """Return the queries, each once.

    Raises:
        ValueError: there is none, or too many; or their file cannot be read.
    """
    asked = [*args.queries]
    if args.file is not None:
        if args.file.exists() and not args.file.is_file():  # a pipe would be waited for
            raise UserError(f"the queries {args.file} are no file; name a text file, UTF-8")
        try:
            asked += args.file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the queries {args.file} cannot be read ({error}); name a text file, UTF-8") from error
    queries = list(dict.fromkeys(query.strip() for query in asked if query.strip()))
    if not queries:
        raise UserError("there is no query; give words such as 'two arrows in a circle', or --queries FILE")
    if odd := next((query for query in queries if not is_utf8(query)), None):
        raise UserError(f"the query {odd!r:.60} is not UTF-8; write it anew")
    if len(queries) > _MOST_QUERIES:
        raise UserError(f"there are {len(queries):,} queries; a page has at most {_MOST_QUERIES}")
    return queries


def _check_page(page: Path) -> None:
    """Raise before anything is embedded if the page could not be written.

    Raises:
        ValueError: its name is no page's, or its folder cannot be written.
    """
    if page.suffix != ".html" or page.is_dir():
        raise UserError(f"--out is {str(page)!r}; name a file that ends in .html")
    check_writable(page.parent, "--out")
