"""Tables: framed on a terminal, plain aligned text in a pipe."""

from collections.abc import Collection, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_GAP = 3  # spaces between columns of plain text


def print_table(
    screen: Console,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Collection[int] = (0,),
) -> None:
    """Print rows under a header.

    Args:
        left: indices of the columns that are set flush left; the others are flush right.
    """
    if not screen.is_terminal:
        print("\n".join(plain_table(header, rows, left)), file=screen.file)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(header):
        table.add_column(Text(name), justify="left" if column in left else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    screen.print(table)


def plain_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)
) -> list[str]:
    """The lines of a table as aligned text without spaces at their ends."""
    lines = [header, *rows]
    widths = [max(cell_len(line[column]) for line in lines) for column in range(len(header))]
    return [
        (" " * _GAP)
        .join(_padded(cell, widths[column], column not in left) for column, cell in enumerate(line))
        .rstrip()
        for line in lines
    ]


def _padded(cell: str, width: int, right: bool) -> str:
    # `cell_len` counts columns of the terminal: some characters take two.
    fill = " " * (width - cell_len(cell))
    return fill + cell if right else cell + fill
