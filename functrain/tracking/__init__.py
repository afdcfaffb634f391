"""What a run leaves to look at: metrics.jsonl, a progress line, and report.html."""
