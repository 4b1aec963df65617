"""What people write, as validated frozen objects, and the messages where they erred."""
