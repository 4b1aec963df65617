"""JSON Schemas (draft 2020-12) of the records in results folders, written by tools/schemas.py from their models."""
