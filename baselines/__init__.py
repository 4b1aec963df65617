"""The methods that KiT is compared with, one file each; attentions have the signature of kitbench/attention."""
