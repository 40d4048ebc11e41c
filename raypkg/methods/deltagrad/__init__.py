"""DeltaGrad (arXiv:2006.14755): deletion and addition of training samples without retraining."""
