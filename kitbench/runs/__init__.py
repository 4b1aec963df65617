"""A suite's cells, prepared, queued, trained and stored."""
