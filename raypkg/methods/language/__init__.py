"""Selection of what a language model is fine-tuned on: RDS+ (arXiv:2503.01807) and LESS (arXiv:2402.04333)."""
