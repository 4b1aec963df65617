"""The resolution sweep: what it covers, the points of each size, the process of each point."""
