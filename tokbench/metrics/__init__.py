"""Table of metrics."""
