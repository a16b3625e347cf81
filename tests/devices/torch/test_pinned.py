"""Pinned memory, as far as it needs no GPU."""

from __future__ import annotations

import sys

import pytest

from ...helpers.processes import run_script


@pytest.mark.skipif(sys.platform != "linux", reason="memory that forks share differs from system to system")
def test_a_fork_shares_no_page_with_its_parent() -> None:
    """If it did, the parent's next write would go to a copy, and the device would go on reading the old page."""
    script = """
        import os
        from ndcache.devices.torch.pinned import PIECE_BYTES, _huge_pages

        memory = _huge_pages(2 * PIECE_BYTES)
        memory[:] = 7
        child = os.fork()
        if not child:
            os._exit(int(memory.max()))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), memory.min())
    """
    assert run_script(script).split() == ["0", "7"]
