"""Run transformers' common model tests on the classes in `common_classes`: FLIP's, and those of exported folders."""

import subprocess

import pytest

pytestmark = pytest.mark.long

try:
    from model.common_classes import (  # noqa: F401
        ExportedCLIPModelTest,
        ExportedSiglipModelTest,
        FlipCleanTextModelTest,
        FlipForConditionalGenerationTest,
        FlipModelTest,
        FlipTextModelTest,
        FlipVisionModelTest,
    )
except subprocess.CalledProcessError as error:
    reason = f"transformers' source distribution cannot be downloaded: {error}; run once with a network"

    def test_the_common_tests_are_here() -> None:
        pytest.fail(reason)
