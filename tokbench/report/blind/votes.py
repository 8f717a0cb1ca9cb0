"""`tokbench report --votes FILE`: how strong models are in people's eyes, with intervals, beside the metrics.

Bradley and Terry (1952): a is preferred to b with probability 1 / (1 + exp(s_b - s_a)). A vote that cannot tell counts
half for each.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokbench.errors import InputError
from tokbench.report.blind.page import code_of, read_votes
from tokbench.report.columns import ResultEntry
from tokbench.report.leaderboard import Block, blocks
from tokbench.report.tables import Heading, Table, TableCell, TableRow

Z = 1.959964  # of a 95 % interval
SHOWN = ("psnr", "lpips-alex", "lpips-vgg", "dreamsim", "rfid")


def strengths(wins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wins of row over column [M, M] -> log strengths [M], which sum to 0, and their covariance [M, M].

    Maximum likelihood by Newton's method; the covariance is the inverse of Fisher's information where the sum is fixed.
    InputError where a group has won or lost all its comparisons with the others: no finite strength is most likely.
    """
    count = len(wins)
    reach = (wins > 0) | np.eye(count, dtype=bool)
    for _ in range(count):
        reach = reach @ reach
    if not reach.all():
        raise InputError("some models won, or lost, all comparisons with the others: strengths need more votes")
    pairs, found = wins + wins.T, np.zeros(count)
    for _ in range(100):
        chance = 1 / (1 + np.exp(found[None] - found[:, None]))  # that the row is preferred
        weights = pairs * chance * (1 - chance)
        information = np.diag(weights.sum(1)) - weights
        covariance = np.linalg.inv(information + 1 / count) - 1 / count  # the sum's own direction taken out
        step = covariance @ (wins - pairs * chance).sum(1)
        found = found + step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            break
    return found, covariance


def tally(files: Sequence[Path], names: Sequence[str]) -> np.ndarray:
    """Wins of row over column [M, M] of models by name. InputError for votes on models that are not among them."""
    wins = np.zeros((len(names), len(names)))
    for file in files:
        votes = read_votes(file)
        place = {code_of(votes["salt"], name): i for i, name in enumerate(names)}
        for vote in votes["votes"]:
            if not set(vote["codes"]) <= place.keys():
                raise InputError(f"{file}: votes on a model that the results lack; name its results with --results")
            first, second = (place[code] for code in vote["codes"])
            share = {"first": 1.0, "second": 0.0, "tie": 0.5}[vote["choice"]]
            wins[first, second] += share
            wins[second, first] += 1 - share
    return wins


def votes_table(files: Sequence[Path], entries: Sequence[ResultEntry]) -> Table:
    """Models by strength, with the metrics that most of them have."""
    names = sorted({entry.name for entry in entries})
    wins = tally(files, names)
    seen = np.flatnonzero((wins + wins.T).sum(1))
    if not len(seen):
        raise InputError(f"{', '.join(map(str, files))}: no votes")
    wins, voted = wins[np.ix_(seen, seen)], [names[i] for i in seen]
    found, covariance = strengths(wins)
    block = _block_of(voted, entries)
    cells = {row.name: row.cells for row in block.rows}
    headings = [Heading(key="strength", better="higher"), Heading(key="95 % interval"), Heading(key="preferred"),
                *block.columns]  # fmt: skip
    rows = []
    for i in np.argsort(-found, kind="stable"):
        error, total = float(covariance[i, i]) ** 0.5, (wins + wins.T)[i].sum()
        low, high = found[i] - Z * error, found[i] + Z * error
        own = {
            "strength": TableCell(f"{found[i]:+.2f}", f"±{error:.2f}", value=float(found[i])),
            "95 % interval": TableCell(f"[{low:+.2f}, {high:+.2f}]"),
            "preferred": TableCell(f"{wins[i].sum():g} of {total:g}"),
        }
        rows.append(TableRow(voted[i], own | dict(cells.get(voted[i], {}))))
    notes = [f"{wins.sum():g} votes; strength: log odds of being preferred to an average one (Bradley-Terry), ± its "
             "standard error; of two models compare the difference", *block.notes]  # fmt: skip
    title = f"blind comparison · {block.title}"
    return Table(title=title, names="tokenizer", columns=headings, groups=[("", rows)], notes=notes)


def _block_of(names: Sequence[str], entries: Sequence[ResultEntry]) -> Block:
    """The block that holds most of these models, with the usual metrics among those measured."""
    measured = {name for entry in entries for name in entry.result.metrics}
    found = blocks(entries, [name for name in SHOWN if name in measured], group=False)
    return max(found, key=lambda block: len(block.entries.keys() & set(names)))
