"""Writing files: what is no plain file stays what it is."""

from __future__ import annotations

import os
from pathlib import Path

from functrain import writing


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    """As /dev/null must, which a rename in its place would make a file of."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        writing.write(pipe, b"page", durable=True)
        assert os.read(reader, 9) == b"page"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert [each.name for each in tmp_path.iterdir()] == ["pipe"]
