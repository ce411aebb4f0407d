"""Log the norm of all weights after every step, to weight_norm.jsonl in the output folder."""

from prefopt.training.callbacks import Callback, StartEvent, StepEvent
from prefopt.training.metrics import MetricsFile


class LogWeightNorm(Callback):
    def on_start(self, event: StartEvent) -> None:
        self.file = MetricsFile(event.run.output / "weight_norm.jsonl")
        if event.run.is_main:
            self.file.rewind(event.step)  # a resumed run takes the steps after its checkpoint again

    def on_step(self, event: StepEvent) -> None:
        squares = sum(float(weight.detach().square().sum()) for weight in event.run.policy.lm.parameters())
        if event.run.is_main:
            self.file.write({"step": event.step, "loss": event.result.loss, "weight_norm": squares**0.5})


if __name__ == "__main__":
    print("python scripts/train.py --method dpo --train.callbacks examples.log_every_step.LogWeightNorm")
