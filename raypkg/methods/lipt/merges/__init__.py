"""Merges, one file for each name: how models that started from the same weights become one.

    @merge(name)    merged(initial, members, *, total, gather, score) → parameters

The members are those of this worker. What else a merge needs it declares by these keywords:

    total   sums a tensor over all workers: one all-reduce
    gather  returns the members of all workers, in the order of their numbers
    score   measures parameters: accuracy on the held-out samples, of which there are some where a merge declares it
"""

from raypkg.methods.lipt import merge as merge
