"""CREST (arXiv:2306.01244): mini-batch coresets for SGD, renewed when a local model of the loss has expired."""
