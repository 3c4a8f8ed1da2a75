"""A vocabulary split over stages: what its exchange costs."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.costmodels.parallelism.vocab import vocab_parallel_time
from meshwright.costmodels.plan_columns import PlanColumns


@pytest.mark.parametrize("kind", ["vocab_1", "interlaced"])
def test_the_exchange_is_as_wide_as_activations_are(make_context, make_plan, kind):
    nothing = np.zeros(1)

    def exchange(precision, length, **changes):
        plan = make_plan(32, dp=1, schedule="1f1b", vocab_parallel=kind, **{"pp": 8, **changes})
        context = make_context(batch=8, length=length, precision=precision)
        columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
        return vocab_parallel_time(context, columns, nothing, nothing)[1][0]

    # As many bytes in half as many tokens.
    assert exchange("fp32", 2048) == exchange("bf16", 4096)
    assert exchange("fp32", 2048) > exchange("bf16", 2048)
    # Every tensor parallel rank sends what it holds.
    split = exchange("bf16", 8192, pp=4, tp=2, sequence_parallel=True)
    assert split == exchange("bf16", 4096, pp=4, tp=2)
