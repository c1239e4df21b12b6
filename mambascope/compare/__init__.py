"""Accuracy against cost of several methods on one data set: ``tools/frontier.py``.

- ``lists``: what is compared, from a YAML file. ``work``: trains and evaluates it, keeping every finished piece.
- ``timing``: measured time of all of it in one interleaved run. ``table``: means and spread over the seeds, CSV.
- ``compare``: one method's curve against the others at equal cost and at equal accuracy. ``cli``: the command.
"""
