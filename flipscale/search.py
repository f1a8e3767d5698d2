"""Find pictures by words: the nearest pictures of a folder to each query, as a page for a browser."""

import argparse
from pathlib import Path

from flipscale.io.errors import UserError
from flipscale.io.files import check_writable, is_utf8, read_text
from flipscale.io.options import Count, number

_MOST_QUERIES = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale search`."""
    parser.add_argument("model", metavar="MODEL", help="A model, as for `flipscale evaluate`.")
    parser.add_argument(
        "pictures", metavar="FOLDER",
        help="A folder of pictures, searched with its subfolders, or shards: a folder of *.tar, a glob, or a range.",
    )  # fmt: skip
    parser.add_argument(
        "queries", metavar="QUERY", nargs="*",
        help="Words, such as 'two arrows in a circle', or a picture file, which finds similar pictures.",
    )  # fmt: skip
    parser.add_argument("--queries", dest="file", metavar="FILE", type=Path, help="A text file, one query per line.")
    parser.add_argument(
        "--out", metavar="PAGE", type=Path, default=Path("search.html"),
        help="The page to write. Default: search.html. An .npz file beside it keeps embeddings for the next search.",
    )  # fmt: skip
    parser.add_argument("--top", type=number(Count), default=8, help="Pictures per query. Default: 8.")


def run(args: argparse.Namespace) -> None:
    """Embed the pictures, search for the queries, and write the page."""
    queries = _queries(args)
    if args.out.suffix != ".html" or args.out.is_dir():
        raise UserError(f"--out is {str(args.out)!r}; name a file that ends in .html")
    check_writable(args.out.parent, "--out")
    from flipscale.pages.pictures import open_pictures

    pictures = open_pictures(args.pictures)
    from flipscale.engines.start import start_accelerator
    from flipscale.evaluation.model_results import data_name
    from flipscale.hub.loading import open_embedder
    from flipscale.pages.search import as_lines, embedded_pictures, searches, write_search_page

    accelerator = start_accelerator([], ".")
    if not accelerator.is_main_process:
        return
    embedder = open_embedder(args.model, accelerator)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    embedded = embedded_pictures(embedder, pictures, args.out.with_suffix(".npz"))
    if embedded.faults:
        first = embedded.faults[0]
        print(f"{len(embedded.faults)} of {len(pictures)} pictures cannot be read and are left out, the first: {first}")
    results = searches(embedder, embedded, queries, args.top)
    model = data_name(str(Path(args.model).parent) if Path(args.model).name == "model" else args.model)
    texts = {"model": model, "place": data_name(args.pictures), "top": args.top}
    reason = write_search_page(args.out, embedder, pictures, embedded, results, **texts)
    print("\n".join(as_lines(results[:5], pictures)))
    count = f"{len(results)} {'query' if len(results) == 1 else 'queries'}"
    print(f"{args.out}: {count} over {len(embedded.rows):,} pictures; open it in a browser")
    print(f"its box only filters these queries: {reason}" if reason else "its box finds any words among these pictures")


def _queries(args: argparse.Namespace) -> list[str]:
    """Return the queries without duplicates. Raise UserError for none, too many, or an unreadable file."""
    lines = [*args.queries]
    if args.file is not None:
        try:
            lines += read_text(args.file).splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"--queries {args.file} cannot be read ({error}); name a text file, UTF-8") from error
    queries = list(dict.fromkeys(query.strip() for query in lines if query.strip()))
    if not queries:
        raise UserError("there is no query; give words such as 'two arrows in a circle', or --queries FILE")
    if odd := next((query for query in queries if not is_utf8(query)), None):
        raise UserError(f"the query {odd!r:.60} is not UTF-8; write it again")
    if len(queries) > _MOST_QUERIES:
        raise UserError(f"there are {len(queries):,} queries; a page has at most {_MOST_QUERIES}")
    return queries
