"""Tables, plots and the page, drawn from records alone. No torch.

In: result files with their provenance; out: ranked blocks as terminal text, Markdown, LaTeX, CSV, figures, HTML.
"""
