"""Run folders: records with schemas, written atomically, read validated, locked."""
