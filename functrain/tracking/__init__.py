"""What a run shows of itself: metrics.jsonl, a progress line, and report.html."""
