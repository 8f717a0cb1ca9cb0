"""Pages of docs/tokenizers/, one a family of published tokenizers, from the tables of facts: `make cards`.

In: families.csv (what it is, how it was checked, traps), published.csv, verified.csv; out: Markdown.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from baselines.published import PUBLISHED, VERIFIED
from tokbench.records.files import write_whole
from tokbench.registry import catalogue
from tokbench.report.tables import written

DOCS = Path(__file__).parents[1] / "docs"
COLUMNS = ("f", "c", "codes", "tokens", "bpp", "params", "px", "licence", "verified", "source")
INDEX = """# Published tokenizers

`tokbench list models` shows every name; `--family vq --columns f,codes,bpp,verified,licence,source --sort bpp` picks,
and `--format markdown|csv|json` writes it for elsewhere. The facts are in `baselines/published.csv`, the readers of
files that diffusers does not read in `baselines/families/`, one module a family. A file is verified when somebody has
run it (`make verify MODELS=a,b` fetches it, runs it, judges its PSNR by its paper's and writes down its sha256);
results of other files say "facts not checked against the published weights".

Every reader checks parameter names and shapes strictly, reads only tensors (safetensors, torch's weights-only reader,
or TorchScript), and is tested on small random instances saved in the published layout. "Against the authors' code"
means: their network and ours, with equal random weights, gave the same codes and images to rounding when the
reader was written; that code is not kept here. `make cards` writes these pages.

"""

with (Path(__file__).parent / "families.csv").open(newline="", encoding="utf-8") as _file:
    FAMILIES = {line["family"]: line for line in csv.DictReader(_file)}


def page(family: str) -> str:
    """A family's card."""
    facts = FAMILIES[family]
    rows = [row for row in PUBLISHED.values() if row.family == family]
    table = written([row for row in catalogue(family, COLUMNS) if row["model"] in PUBLISHED], "markdown")
    points = {
        "Checked": facts["checked"],
        "Traps": facts["traps"],
        "Verified": "; ".join(
            f"`{row.name}` on {run['date']}, {run['psnr']} dB on the bundled photographs"
            for row in rows
            if (run := VERIFIED.get(row.name))
        ),
        "Licences": "; ".join(dict.fromkeys(row.licence for row in rows)),
        "Papers": ", ".join(dict.fromkeys(row.paper for row in rows if row.paper)),
        "Decoders that can be swapped": "; ".join(shared(family)),
    }
    points |= {f"`{row.name}`": row.note for row in rows}
    listed = "\n".join(f"- {point}: {text}." for point, text in points.items() if text)
    return f"# {family}\n\n{facts['what']}.\n\n{table}\n\n{listed}\n"


def shared(family: str) -> Iterator[str]:
    """What a family's rows share their latents with."""
    for space in dict.fromkeys(row.latent_space for row in PUBLISHED.values() if row.family == family):
        names = [f"`{row.name}`" for row in PUBLISHED.values() if row.latent_space == space]
        if len(names) > 1:
            yield " ".join(names)


def index() -> str:
    """The list of families."""
    lines = []
    for family, facts in FAMILIES.items():
        names = {row.name for row in PUBLISHED.values() if row.family == family}
        count = f"{len(names)} rows, {len(names & set(VERIFIED))} verified"
        lines.append(f"- [{family}](tokenizers/{family}.md) ({count}): {facts['what']}.\n")
    return INDEX + "".join(lines)


def pages() -> dict[Path, str]:
    """Every page, by its place below docs/."""
    return {Path("tokenizers.md"): index()} | {Path("tokenizers", f"{name}.md"): page(name) for name in FAMILIES}


if __name__ == "__main__":
    for place, text in pages().items():
        write_whole(DOCS / place, text.encode())
