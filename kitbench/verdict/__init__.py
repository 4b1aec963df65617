"""What may be concluded: tables (and all else that is made) from stored runs alone."""
