"""How workers speak, without any others."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from functrain.distributed import speaking


def test_a_store_that_never_answers_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the net is cut, a question to it has no end."""

    class Silent:
        def set_timeout(self, _given: Any) -> None: ...

        def check(self, _places: list[str]) -> bool:
            threading.Event().wait(60)
            return False

    monkeypatch.setattr(speaking.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(speaking, "_store", Silent)
    monkeypatch.setattr(speaking, "_PATIENCE", 0.1)
    begin = time.monotonic()
    assert "does not answer" in speaking.Speaking(size=2)._whereabouts()
    assert time.monotonic() < begin + 30
