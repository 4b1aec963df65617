"""The backbone with any attention in it; methods by name or file; weights read without running code."""
