"""PromptKD as a plain port of the reference loop to TRL. It is a baseline for benchmarks, not a trainer to use.

It samples one micro-batch at a time and uses PEFT's own prompt-tuned forward. Each micro-batch runs the student twice
and the teacher three times, with all logits at all positions.
"""

import torch
from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

from trl_promptkd._trl import GKDTrainer


class NaivePromptKDTrainer(GKDTrainer):
    def __init__(self, model, teacher_model, args, **kwargs):
        super().__init__(model, teacher_model, args, **kwargs)
        config = PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=7, prompt_tuning_init=PromptTuningInit.RANDOM
        )
        self.prompted = get_peft_model(self.teacher_model, config)
        self.prompted.eval()
        parameters = [p for p in self.prompted.parameters() if p.requires_grad]
        self.prompt_optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate)

    def _reverse_kl(self, first, second, inputs, num_items_in_batch):
        return self.generalized_jsd_loss(
            first[:, -inputs["labels"].size(1) : -1],
            second[:, -inputs["labels"].size(1) : -1],
            labels=inputs["labels"][:, 1:],
            beta=1.0,
            num_items_in_batch=num_items_in_batch,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            student_logits = model(**text).logits
            with self.prompted.disable_adapter():
                plain_logits = self.prompted(**text).logits
        prompted_logits = self.prompted(**text).logits
        loss = self._reverse_kl(prompted_logits, student_logits, inputs, num_items_in_batch)
        loss = loss + self._reverse_kl(prompted_logits, plain_logits, inputs, num_items_in_batch)
        loss.backward()
        if self.accelerator.sync_gradients:
            self.prompt_optimizer.step()
            self.prompt_optimizer.zero_grad()

        student_logits = model(**text).logits
        with torch.no_grad():
            prompted_logits = self.prompted(**text).logits
        loss = self._reverse_kl(student_logits, prompted_logits, inputs, num_items_in_batch)
        return (loss, None) if return_outputs else loss
