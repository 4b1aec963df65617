"""The machine: device and versions, processes, interruption, progress, tracking."""
