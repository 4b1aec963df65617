"""The attentions that KiT is compared with, one file each, all with the signature of kitbench/attention."""
