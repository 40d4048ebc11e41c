"""What runs are made of: training, pre-training and selection on the cluster, with the run folder as memory."""
