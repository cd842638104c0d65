"""Make pytest explain failed assertions of the rules, as it does for those in test files."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.support.contract", "tests.support.engineio")
