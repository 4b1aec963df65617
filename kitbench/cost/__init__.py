"""What a callable costs: multiply-adds (flops), memory, time; and the sweep of all three over resolution (scale)."""
