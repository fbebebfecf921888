"""`personalize tokens`: rare single tokens of a base, the weakest prior first."""

from collections.abc import Sequence

from personalize.commands.session import open_base, resolve
from personalize.common.terminal import SILENT, Terminal
from personalize.data.rare_tokens import RareToken, rank_tokens

HEAD = ("word", "id", "prior", "norm", "nearest words", "")


def tokens(
    base: str = "toyland", *, limit: int = 20, settings: Sequence[str] = (), screen: Terminal = SILENT
) -> list[RareToken]:
    """The `limit` rare words of a base with the weakest prior, one token in each of its text encoders.

    UserError where the vocabulary has none.
    """
    return rank_tokens(open_base(resolve(None, [*settings, f"base={base}"]), screen), limit=limit)


def token_lines(rows: list[RareToken]) -> list[str]:
    """A table in plain columns, and what its numbers are. One norm for each text encoder."""
    table = [HEAD]
    for row in rows:
        near = ", ".join(f"{word} {cosine:.2f}" for word, cosine in row.neighbours)
        norms = " ".join(f"{norm:.3f}" for norm in row.norms)
        table.append((row.word, str(row.id), f"{row.prior:.2f}", norms, near, row.remark))
    widths = [max(map(len, column)) for column in zip(*table)]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip() for cells in table]
    note = "prior: 0 the weakest of the rare words, 1 the strongest, by the norm of the embedding and its nearest common words"
    return [*shown, note]
