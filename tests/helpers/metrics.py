"""Looking a logged name up in the register of metrics."""

import re

from instructgpt_hf.metric_register import stage_metrics


def find_metric(name, stage):
    """The entry of a name in a stage's log or stage.json; None for an unknown name.

    An interval's ends (`_low`, `_high`) belong to their value. `eval_x` without an entry of its own is `x`, or the
    `train_x` of the Trainer's timing, measured on held-out data.
    """
    value = re.sub("_(low|high)$", "", name)
    base = value.removeprefix("eval_")
    candidates, known = (name, value, base, f"train_{base}"), stage_metrics(stage)
    return next((item for word in candidates for item in known if item.number_in(word) is not None), None)
