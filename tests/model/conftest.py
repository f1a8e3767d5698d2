"""Names the markers that transformers' own common tests carry, so that `--strict-markers` lets them in."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    for name in (
        "accelerate_tests",
        "flash_attn_test",
        "flash_attn_3_test",
        "flash_attn_4_test",
        "slow",
        "torch_compile_test",
    ):
        config.addinivalue_line("markers", f"{name}: of transformers' common tests")
