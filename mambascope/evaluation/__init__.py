"""What a trained model is worth: cost, threshold sweep, measured time, predictions, report.

Modules (imported one by one, so that a command pays only for what it uses):

- ``cost``: parameters and multiply-adds in closed form; ``python -m mambascope.models.cost MODEL`` prints them.
- ``flop_count``: the same counted by ``torch.utils.flop_counter`` on the running model.
- ``collect``: both stages on a data set once. ``sweep``: every threshold from that, and the choice of one.
- ``throughput``: measured milliseconds per image. ``engine``: a predictor that keeps fine batches full.
- ``report``: the report folder that training and evaluation leave behind.
- ``trainings``: trainings that a command starts, resumes or finds finished.
- ``eval_cli``, ``predict_cli``: the command lines of ``tools/eval_cls.py`` and ``tools/predict.py``.
"""
