"""The network that takes any attention; methods by name or file; weights read safely."""
