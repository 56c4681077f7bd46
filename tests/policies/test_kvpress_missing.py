import sys

import pytest

from pytest_kvguard.errors import Unavailable
from pytest_kvguard.policies import get_policy


def test_without_kvpress_its_policies_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)  # an import now fails
    with pytest.raises(Unavailable, match=r"pip install 'pytest-kvguard\[kvpress\]'"):
        get_policy("kvpress:SnapKVPress(window_size=16)")
