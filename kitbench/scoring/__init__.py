"""Scoring restored images by a protocol: tiles, metrics, LPIPS, crops."""
