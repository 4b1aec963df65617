"""Data cards, one TOML file a set; no code. (This file makes the folder a package, installed as kitbench.datasets.)"""
