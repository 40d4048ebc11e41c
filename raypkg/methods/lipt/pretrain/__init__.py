"""Pre-trainings, one file for each name: where the model comes from whose gradients select.

    @pretraining(name)    pretrain(settings, report, *, samples, workers) → None

A pre-training carries out the report's phase "pretrain" and leaves the model's weights in the run folder as
``RESULT``; a record of what training saw of each sample, which some coreset rules need, lies beside it.
"""

from raypkg.methods.lipt import pretraining as pretraining

RESULT = "pretrained.safetensors"
MERGED_FILE = "checkpoints/merged.safetensors"  # of an unfinished run, where joint epochs follow the merge
