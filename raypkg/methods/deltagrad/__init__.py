"""DeltaGrad (arXiv:2006.14755): what a model would be had some samples been in, or not been in, its training."""
