"""The pages of published tokenizers are those of the tables of facts."""

from baselines.cards import DOCS, FAMILIES, pages
from baselines.published import PUBLISHED


def test_every_family_has_facts_and_its_page_is_not_stale() -> None:
    assert set(FAMILIES) == {row.family for row in PUBLISHED.values()}
    assert {place.name for place in (DOCS / "tokenizers").iterdir()} == {f"{family}.md" for family in FAMILIES}
    for place, text in pages().items():
        assert (DOCS / place).read_text(encoding="utf-8") == text, f"{place}: run `make cards`"
