"""The cost of a callable: multiply-adds, memory and time; in sweep/, their measurement against resolution."""
