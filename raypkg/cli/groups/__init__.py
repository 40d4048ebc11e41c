"""Further commands of an experiment, in a file of its name: ``COMMANDS`` joins ``train`` in a group."""
