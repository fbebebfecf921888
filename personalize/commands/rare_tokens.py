"""`personalize tokens`: rare single tokens of a base, the weakest prior first."""

from personalize.data import rare_tokens
from personalize.data.rare_tokens import RareToken
from personalize.models.interface import LatentModel

HEAD = ("word", "id", "prior", "norm", "nearest words", "")


def run(model: LatentModel, *, limit: int = 20) -> list[RareToken]:
    """The `limit` rare words with the weakest prior. UserError where the vocabulary has none."""
    return rare_tokens.rank_tokens(model, limit=limit)


def lines(rows: list[RareToken]) -> list[str]:
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
