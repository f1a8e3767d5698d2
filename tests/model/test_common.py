"""Run transformers' common model tests on the FLIP classes in `common_classes`."""

from pathlib import Path

import pytest
from model.transformers_tests import DownloadError, fetch

pytestmark = pytest.mark.long

try:
    from model.common_classes import (  # noqa: F401
        FlipCleanTextModelTest,
        FlipForConditionalGenerationTest,
        FlipForImageClassificationTest,
        FlipForQuestionAnsweringTest,
        FlipModelTest,
        FlipTextModelTest,
        FlipVisionModelTest,
    )
except DownloadError as error:
    reason = str(error)

    def test_the_common_tests_are_here() -> None:
        pytest.fail(reason)


def test_a_failed_download_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DownloadError, match=r"cannot be downloaded: ERROR: .*\. Let the tests run once"):
        fetch("flipscale-no-such-package==1.0", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
