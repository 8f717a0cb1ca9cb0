"""What probes found: a table of one line a probe, and the curves. In: records; out: tables and figures."""
