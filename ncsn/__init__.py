"""Score networks and Langevin samplers: NCSN (arXiv 1907.05600) and its successors."""
