"""fastdpo: preference training (DPO) on one GPU, memory-constrained, fast and exact."""
