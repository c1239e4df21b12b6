"""What a trained model is worth: both stages on a data set, every threshold, measured time, a report.

Modules (imported one by one, so that a command pays only for what it uses):

- ``collect``: both stages on a data set once. ``sweep``: every threshold from that. ``choice``: what it takes to
  choose one.
- ``throughput``: measured milliseconds per image. ``machine``: what they were measured on.
- ``report``: the report folder that training and evaluation leave behind. ``tables``: its text.
- ``examples``, ``figures``: images and pictures in it. ``options``: what it takes. ``after_training``: that of a run.
- ``published``: figures of the papers.
"""
