"""ROUGE-L and exact match of instruction following, as a local module for `evaluate`."""

import datasets
import evaluate

from trl_promptkd.metrics import instruction_scores


class InstructionScores(evaluate.Metric):
    """See [`trl_promptkd.metrics.instruction_scores`]."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE-L (F-measure, stemmed) and exact match, in percent.",
            citation="",
            inputs_description="predictions: texts; references: a list of texts for each of them",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions, references):
        return instruction_scores(predictions, references)
