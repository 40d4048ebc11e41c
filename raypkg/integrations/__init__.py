"""Adapters of the methods to the training loops of other libraries, which are imported only from here.

Accelerate needs none: ``prepare`` returns a CoresetLoader or a CrestLoader as it is.
"""
