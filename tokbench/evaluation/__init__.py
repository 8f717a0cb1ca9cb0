"""From images to a record: reconstruct, measure, store per sample, summarise.

In: a tokenizer, a `Source` and the options of a `Measurement`; out: an `EvalResult` and its files.
"""
