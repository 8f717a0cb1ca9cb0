"""Which reconstruction do people prefer? In: saved images; out: a page of unnamed pairs, a table of votes."""
