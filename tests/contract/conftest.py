"""Assertions of the rules explain themselves as those of test files do."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.support.contract", "tests.support.engineio")
