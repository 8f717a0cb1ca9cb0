"""Records on their way to others and back: hub metadata, a JSON schema, results that somebody else made.

Comes in: records. Goes out: YAML of a hub card, `docs/schema/`, records that were examined and copied into `results/`.
"""
