"""Many runs: planned, on this machine or a cluster, and what they are at."""
