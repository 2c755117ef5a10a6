"""How launchers show things: tables, and lines above one live line."""

import shutil
from collections.abc import Sequence
from typing import TextIO

from mixcon_jax.host.output import lasting


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first two to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    cells = [[cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
             for row in (header, *rows)]  # fmt: skip
    return '\n'.join('  '.join(row).rstrip() for row in cells)


class Screen:
    """Lines and, on a terminal, one live line below them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._terminal = lasting(stream), stream.isatty()
        self._live, self._width = '', 0

    def say(self, text: str) -> None:
        """Writes lines that stay."""
        self._write(f'\r{" " * self._width}\r{text}\n' if self._width else f'{text}\n')
        self._live, self._width = '', 0

    def live(self, text: str) -> None:
        """Replaces the live line; elsewhere than on a terminal nothing is written."""
        text = text[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be taken back
        if self._terminal and text != self._live:
            self._write(f'\r{text.ljust(self._width)}')
            self._live, self._width = text, len(text)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
