"""JSON Schemas (draft 2020-12) of the records in results folders. Written by tools/schemas.py from the models that read them."""
