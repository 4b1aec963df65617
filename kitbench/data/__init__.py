"""Where images come from: cards (what a set is), reading (checked, decoded), batches (pure functions of seed, step)."""
