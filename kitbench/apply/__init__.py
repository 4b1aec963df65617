"""A trained run put to use: restore, explain, submit, reproduce."""
