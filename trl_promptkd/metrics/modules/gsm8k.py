"""The share of right final numbers in answers to word problems, as a local module for `evaluate`."""

import datasets
import evaluate

from trl_promptkd.metrics import gsm8k_accuracy


class GSM8K(evaluate.Metric):
    """See [`trl_promptkd.metrics.gsm8k_accuracy`]."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="The share of answers whose final number is right, by three sets of rules, in percent.",
            citation="",
            inputs_description="predictions: texts; references: texts that end with the right number",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        return gsm8k_accuracy(predictions, references)
