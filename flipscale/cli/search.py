"""Find pictures by words: the nearest pictures of a folder to each query, as a page for a browser."""

from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

from flipscale.io.errors import UserError
from flipscale.io.options import Count
from flipscale.io.paths import check_page_path, is_utf8, read_text

_MOST_QUERIES = 500


@dataclass(frozen=True)
class Search:
    """Find the pictures of a folder that are nearest to words, and write a page for a browser.

    Args:
        model: A model, as for `flipscale evaluate`.
        pictures: A folder of pictures, searched with its subfolders, or shards: a folder of *.tar, a glob, or a range.
        query: Words, such as 'two arrows in a circle', or a picture file, which finds similar pictures.
        queries: A text file, one query per line.
        out: The page to write. An .npz file next to it keeps embeddings for the next search.
        top: Pictures per query.
        maps: Show on the page where in each picture the words are.
        dims: Cut the embeddings to their first numbers, for a model whose first numbers were trained.
    """

    model: str
    pictures: str
    query: list[str] = field(default_factory=list)
    _: KW_ONLY
    queries: Path | None = None
    out: Path = Path("search.html")
    top: Count = 8
    maps: bool = False
    dims: Count | None = None

    def run(self) -> None:
        queries = self._all_queries()
        check_page_path(self.out, "--out")
        from flipscale.pages.pictures import open_pictures

        pictures = open_pictures(self.pictures)
        from flipscale.engines.build_engine import start_accelerator
        from flipscale.evaluation.model_results import data_name
        from flipscale.hub.loading import open_embedder
        from flipscale.pages.search_page import as_lines, embedded_pictures, searches, with_maps, write_search_page

        accelerator = start_accelerator([], ".")
        if not accelerator.is_main_process:
            return
        embedder = replace(open_embedder(self.model, accelerator), dims=self.dims)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        embedded = embedded_pictures(embedder, pictures, self.out.with_suffix(".npz"))
        if embedded.faults:
            first = embedded.faults[0]
            count = f"{len(embedded.faults)} of {len(pictures)}"
            print(f"{count} pictures cannot be read and are left out, the first: {first}")
        results = searches(embedder, embedded, queries, self.top)
        if self.maps:
            results = with_maps(embedder, pictures, results)
        model = data_name(str(Path(self.model).parent) if Path(self.model).name == "model" else self.model)
        texts = {"model": model, "place": data_name(self.pictures), "top": self.top}
        reason = write_search_page(self.out, embedder, pictures, embedded, results, **texts)
        print("\n".join(as_lines(results[:5], pictures)))
        count = f"{len(results)} {'query' if len(results) == 1 else 'queries'}"
        print(f"{self.out}: {count} over {len(embedded.rows):,} pictures; open it in a browser")
        print(
            f"its box only filters these queries: {reason}"
            if reason
            else "its box finds any words among these pictures"
        )

    def _all_queries(self) -> list[str]:
        """Return the queries without duplicates. Raise UserError for none, too many, or an unreadable file."""
        lines = [*self.query]
        if self.queries is not None:
            try:
                lines += read_text(self.queries).splitlines()
            except (OSError, ValueError) as error:
                raise UserError(
                    f"--queries {self.queries} cannot be read ({error}); name a text file, UTF-8"
                ) from error
        queries = list(dict.fromkeys(query.strip() for query in lines if query.strip()))
        if not queries:
            raise UserError("there is no query; give words such as 'two arrows in a circle', or --queries FILE")
        if odd := next((query for query in queries if not is_utf8(query)), None):
            raise UserError(f"the query {odd!r:.60} is not UTF-8; write it again")
        if len(queries) > _MOST_QUERIES:
            raise UserError(f"there are {len(queries):,} queries; a page has at most {_MOST_QUERIES}")
        return queries
