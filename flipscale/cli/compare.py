"""Compare runs: their recipes, curves and last results, as text and as a page: `flipscale compare runs/A runs/B`."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from flipscale.io.errors import UserError
from flipscale.io.paths import check_page_path


@dataclass(frozen=True)
class Compare:
    """Compare runs by their recipes, curves and last results, and write a page for a browser.

    Args:
        runs: Two or more run directories, finished or not. The others are compared with the first.
        out: Page to write.
    """

    runs: list[Path]
    _: KW_ONLY
    out: Path = Path("compare.html")

    def run(self) -> None:
        if len({run.resolve() for run in self.runs}) < max(2, len(self.runs)):
            raise UserError(
                f"{', '.join(map(str, self.runs))} is only one run or names a run twice; name different runs"
            )
        check_page_path(self.out, "--out")
        from flipscale.pages.comparison import Comparison, write_comparison

        comparison = Comparison.of(self.runs)
        print(comparison.text())
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_comparison(comparison, self.out)
        print(f"\n{self.out}: the same with curves; open it in a browser")
