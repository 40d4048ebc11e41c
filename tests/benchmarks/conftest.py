"""Scripts that need packages of their own are not searched for doctests."""

collect_ignore = ["efficientnet.py"]
