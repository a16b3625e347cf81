"""Record ``ndcache demo`` in a pseudo-terminal, and write it as an animated SVG.

Usage: ``pip install . pyte && python docs/record_demo.py docs/demo.svg``
"""

from __future__ import annotations

import fcntl
import html
import os
import pty
import struct
import sys
import termios
import time
from pathlib import Path

import pyte

COLUMNS, ROWS = 80, 17
COMMAND = [sys.executable, "-m", "ndcache", "demo"]
#: Seconds between two frames, and for which the last one stays.
FRAME, REST = 0.25, 4.0
#: Pixels of a character, and of a line.
WIDTH, HEIGHT = 8.0, 18
STYLE = (
    "rect{fill:#f6f8fa}text{fill:#1f2328;font:13px ui-monospace,monospace;white-space:pre}"
    "@media(prefers-color-scheme:dark){rect{fill:#161b22}text{fill:#e6edf3}}"
    "g{visibility:hidden}g:last-of-type{visibility:visible}"
)
#: Viewers that want no motion get the last frame.
STILL = "@media(prefers-reduced-motion){g{animation:none!important}}"

Frame = tuple[float, tuple[str, ...]]


def record() -> list[Frame]:
    """Run the command, and return what the screen shows, each time with the seconds since the start."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    stream.feed(b"$ ndcache demo\r\n")
    frames: list[Frame] = [(0.0, tuple(screen.display))]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(COMMAND[0], COMMAND)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    start = time.monotonic()
    while data := _read(terminal):
        stream.feed(data)
        now, shown = time.monotonic() - start, tuple(screen.display)
        if shown == frames[-1][1]:
            continue
        if now - frames[-1][0] < FRAME:
            frames[-1] = (frames[-1][0], shown)
        else:
            frames.append((now, shown))
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the demonstration failed")
    return frames


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the command has ended
        return b""


def as_svg(frames: list[Frame]) -> str:
    """Return an SVG that shows one frame after another, and then begins again."""
    total = frames[-1][0] + REST
    ends = [begun for begun, _ in frames[1:]] + [total]
    width, height = COLUMNS * WIDTH + 16, ROWS * HEIGHT + 16
    rules, groups = [STYLE], []
    for number, ((begun, lines), end) in enumerate(zip(frames, ends, strict=True)):
        first, last = 100 * begun / total, 100 * end / total
        rules.append(
            f"@keyframes f{number}{{0%,{first:.2f}%{{visibility:hidden}}"
            f"{first + 0.001:.3f}%,{last:.2f}%{{visibility:visible}}{last + 0.001:.3f}%,100%{{visibility:hidden}}}}"
            f"#f{number}{{animation:f{number} {total:.2f}s step-end infinite}}"
        )
        texts = "".join(
            f'<text x="8" y="{8 + HEIGHT * (row + 1) - 4}" xml:space="preserve">{html.escape(line.rstrip())}</text>'
            for row, line in enumerate(lines)
            if line.strip()
        )
        groups.append(f'<g id="f{number}">{texts}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" width="{width:g}" height="{height}">'
        f"<title>ndcache demo</title><style>{''.join(rules)}{STILL}</style>"
        f'<rect width="100%" height="100%" rx="8"/>{"".join(groups)}</svg>\n'
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(as_svg(record()), "utf-8")
