"""GEdit-Bench: dataset, scores, report."""
