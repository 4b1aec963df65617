"""A protocol in, scores out: tiles, metrics, LPIPS, crops."""
