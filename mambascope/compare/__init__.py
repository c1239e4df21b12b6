"""Methods side by side, and ablations: ``tools/compare.py LIST``.

- ``lists``: what is compared, from a YAML file. ``sources``: where its weights come from.
- ``trainings``, ``work``, ``changes``, ``results``: trains and evaluates it, keeping every finished piece.
- ``timing``: measured time of all of it in one interleaved run. ``table``: means and spread over the seeds, CSV.
- ``curves``: one method's curve against the rest at equal cost and at equal accuracy. ``verdicts``: ablation tables.
- ``report``: the files of a comparison.
"""
