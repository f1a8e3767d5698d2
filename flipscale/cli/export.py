"""Export a run's model as a folder that transformers loads: `flipscale export runs/NAME`."""

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Literal

from flipscale.io.command_line import OutputFolder
from flipscale.io.errors import UserError
from flipscale.io.options import CountOrZero, Share


@dataclass(frozen=True)
class Export:
    """Write the model of a checkpoint as a folder that transformers loads.

    Args:
        run_dir: A run directory, finished or not.
        step: Step of the checkpoint. Default: the newest.
        dtype: Data type of the weights.
        interpolate: Mix the weights with those of another model (WiSE-FT), such as the start of a fine-tuning: a run, a
            model folder or a Hub name.
        alpha: Share of the run's own weights with --interpolate, by default 0.5. With several shares, each gets its own
            folder in --out, such as alpha-0.25.
        adapter: Write a folder for PEFT with only the low-rank changes of a run with optim.lora, without the weights.
        out: Folder to write. Default: RUN_DIR/export-STEP.
    """

    run_dir: Path
    _: KW_ONLY
    step: CountOrZero | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    interpolate: str | None = None
    alpha: list[Share] = field(default_factory=list)
    adapter: bool = False
    out: OutputFolder | None = None

    def run(self) -> None:
        import torch

        from flipscale.engines.checkpoint import checkpoint_of, latest_checkpoint
        from flipscale.hub.export import export_adapter, export_checkpoint

        checkpoint = latest_checkpoint(self.run_dir) if self.step is None else checkpoint_of(self.run_dir, self.step)
        if self.alpha and self.interpolate is None:
            raise UserError(f"--alpha is {self.alpha}, and no model is named to mix with; add --interpolate MODEL")
        if checkpoint is None:
            raise UserError(f"{self.run_dir} has no checkpoint; name a run directory with checkpoints/step-*")
        out = self.out or self.run_dir / f"{'adapter' if self.adapter else 'export'}-{int(checkpoint.name[5:])}"
        if self.adapter:
            if self.interpolate or self.dtype != "fp32":
                raise UserError("--adapter writes the changes alone, in fp32; leave --interpolate and --dtype out")
            print(export_adapter(checkpoint, out))
            return
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]
        if self.interpolate is None:
            print(export_checkpoint(checkpoint, out, dtype))
            return
        alphas = dict.fromkeys(self.alpha or [0.5])
        for alpha in alphas:
            folder = out if len(alphas) == 1 else out / f"alpha-{alpha:g}"
            print(export_checkpoint(checkpoint, folder, dtype, self.interpolate, alpha))
