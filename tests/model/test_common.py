"""Run transformers' common model tests on the classes in `common_classes`."""

import subprocess

import pytest

pytestmark = pytest.mark.long

try:
    from model.common_classes import (  # noqa: F401
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
