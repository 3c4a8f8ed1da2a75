from dataclasses import replace

import numpy as np

from meshwright.simcore.serving.step_table import StepTable
from meshwright.simcore.serving.step_times import decode_step_time, prompt_step_time


def test_step_times_follow_the_tables_formula() -> None:
    axis = np.array([1.0, 3.0])
    table = StepTable(
        token_counts=axis,
        graph_token_time=np.array([1.0, 3.0]),
        eager_token_time=np.array([9.0, 9.0]),
        decode_batch_sizes=axis,
        decode_contexts=np.array([0.0, 10.0]),
        decode_attention_time=np.array([[0.0, 1.0], [0.0, 3.0]]),
        prompt_lengths=np.array([0.0, 1.0]),
        prefill_attention_time=np.array([0.0, 1.0]),
        step_latency=0.5,
        host_time=4.0,
        is_host_hidden=True,
    )
    assert decode_step_time(table, 2.0, 5.0) == 4.0
    assert decode_step_time(table, 3.0, 10.0) == 3.0 + 3.0 + 0.5
    assert decode_step_time(replace(table, is_host_hidden=False), 2.0, 5.0) == 2.0 + 1.0 + 0.5 + 4.0
    assert prompt_step_time(table, 1.0) == 9.0 + 1.0 + 0.5
    assert prompt_step_time(replace(table, eager_host_time=20.0), 1.0) == 20.0
