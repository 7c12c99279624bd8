import pytest
import torch
from reference import kl, log_probs
from tiny import tiny_model

from trl_promptkd.evaluation.quantization_receipt import quantization_receipt


ROWS = [
    {"prompt_ids": [7, 8], "completion_ids": [9, 10, 0]},
    {"prompt_ids": [11, 12, 13], "completion_ids": [14, 0]},
    {"prompt_ids": [15], "completion_ids": []},
    {"prompt_ids": [16, 17], "completion_ids": [18, 19, 20, 0]},
]


def test_equals_rows_alone():
    full, other = tiny_model("gpt2", seed=1), tiny_model("gpt2", seed=2)
    receipt = quantization_receipt(full, other, ROWS, pad_token_id=0, batch_size=2)
    values, agree, nll, count = [], 0, [0.0, 0.0], 0
    with torch.no_grad():
        for row in ROWS:
            ids, first = row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"])
            if first == len(ids):
                continue
            p, q = log_probs(full, ids, first), log_probs(other, ids, first)
            values += [float(kl(a, b)) for a, b in zip(p, q, strict=True)]
            agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            for index, logs in enumerate((p, q)):
                nll[index] -= float(logs[torch.arange(len(logs)), torch.tensor(row["completion_ids"])].sum())
            count += len(p)
    assert (receipt["num_rows"], receipt["num_tokens"]) == (3, count)
    assert receipt["kl_full_quantized"] == pytest.approx(sum(values) / count, rel=1e-4)
    assert receipt["kl_full_quantized_p95"] == pytest.approx(float(torch.tensor(values).quantile(0.95)), rel=1e-4)
    assert receipt["top1_agreement"] == pytest.approx(agree / count)
    assert receipt["answer_nll_full"] == pytest.approx(nll[0] / count, rel=1e-4)
    assert receipt["answer_nll_quantized"] == pytest.approx(nll[1] / count, rel=1e-4)


def test_equal_models_agree():
    receipt = quantization_receipt(tiny_model(), tiny_model(), ROWS, pad_token_id=0)
    assert receipt["kl_full_quantized"] == pytest.approx(0, abs=1e-6)
    assert receipt["top1_agreement"] == 1.0


def test_rows_without_answers_are_refused():
    with pytest.raises(ValueError, match="needs rows with answers"):
        quantization_receipt(tiny_model(), tiny_model(), ROWS[2:3], pad_token_id=0)
