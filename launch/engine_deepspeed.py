"""The engine of DeepSpeed: ZeRO over all ranks, around the Hugging Face model with seqpar's attention."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from seqpar.integrations.supported import require

from .config import TrainConfig
from .distributed import Ranks
from .engine_torch import TransformersEngine
from .engines import Setup, adamw, missing
from .model import checkpointed, decoder_layers
from .verify import clean

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LARGEST_BUCKET = 50_000_000
# The folder of DeepSpeed's files in a checkpoint: the checkpoint itself, since a manifest lists files, not folders.
_TAG = "."


class DeepSpeedEngine(TransformersEngine):
    """`deepspeed.initialize` with our AdamW and seqpar's mpu, in ZeRO 1, 2 or 3.

    The model is fp32, and bf16 is autocast: parameters, gradients and their sums stay fp32. A checkpoint is continued
    on as many ranks and in the same stage.
    """

    def __init__(self, setup: Setup, model: PreTrainedModel) -> None:
        import deepspeed
        from deepspeed.utils import logger

        from seqpar.integrations.deepspeed import SequenceParallel

        super().__init__(setup, model)
        config, ranks = setup.config, setup.ranks
        self.placement = f"in ZeRO {config.zero}"
        logger.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # called by it
        parameters = model.num_parameters()
        for name, _ in decoder_layers(model):
            checkpointed(model, name, config.checkpoint_activations)
        nn.Module.to(model, ranks.device)
        model.train()
        if setup.dtype != torch.float32:  # inside of the module: DeepSpeed's own would send gradients in bf16
            model.forward = torch.autocast(ranks.device.type, setup.dtype)(model.forward)
        optimizer = adamw(model, config)
        # Not its sum in shared memory, compiled here and now behind a lock that outlives a process that is killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        mpu = SequenceParallel(ranks.sequence.size)
        self.model, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            mpu=mpu,
            dist_init_required=False,
            config=_settings(config, self.shape, parameters, ranks),
        )
        self.optimizer = optimizer
        # What ZeRO 1 and 2 average is too large by the ranks of a sequence; ZeRO 3 averages over all.
        self._scale = 1.0 if config.zero == 3 else 1.0 / ranks.sequence.size

    @classmethod
    def check(cls, config: TrainConfig, shape: PretrainedConfig, device: torch.device) -> None:
        """See :class:`Engine`."""
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # which DeepSpeed reads, and torchrun sets
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            raise missing("deepspeed", error) from error
        require("deepspeed", "0.19", "0.20")

    @classmethod
    def identity(cls, config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
        """See :class:`Engine`."""
        return {**super().identity(config, ranks), "zero_stage": config.zero, "ranks": ranks.size}

    def backward(self, loss: Tensor) -> None:
        """See :class:`Engine`."""
        self.model.backward(loss * self._scale)

    def update(self, rate: float) -> float:
        """See :class:`Engine`; DeepSpeed clips."""
        self._set_rate(rate)
        self.model.step()
        return float(self.model.get_global_grad_norm())  # infinite where it found any number that isn't finite

    def weights(self) -> dict[str, Tensor]:
        """See :class:`Engine`; on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param

        named = self.model.module.state_dict(keep_vars=True).items()
        whole = [(clean(name), safe_get_full_fp32_param(x) if isinstance(x, nn.Parameter) else x) for name, x in named]
        return {name: x.detach().cpu() for name, x in whole}

    def gradients(self) -> dict[str, Tensor]:
        """See :class:`Engine`; on every rank."""
        from deepspeed.utils import safe_get_full_grad

        named = self.model.module.named_parameters()
        whole = {clean(name): safe_get_full_grad(parameter) for name, parameter in named}
        return {name: gradient.cpu() for name, gradient in whole.items() if gradient is not None}

    def writer(self) -> PreTrainedModel:
        """See :class:`Engine`."""
        module: PreTrainedModel = self.model.module
        return module

    def save(self, folder: Path) -> None:
        """See :class:`Engine`; beside the weights are DeepSpeed's own files, for `load`."""
        dcp.save({"model": self.weights()}, checkpoint_id=folder)
        try:
            self.model.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        except RuntimeError as error:  # what torch.save makes of a full disk
            raise OSError(str(error)) from error

    def _load(self, folder: Path) -> None:
        found, _ = self.model.load_checkpoint(str(folder), tag=_TAG)
        if found is None:
            raise ValueError(f"{folder}: DeepSpeed found none of its files there; resume an older one, or start anew")


def _settings(config: TrainConfig, shape: PretrainedConfig, parameters: int, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's config."""
    return {
        "train_micro_batch_size_per_gpu": config.batch_size // ranks.mesh["dp"].size(),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.zero,
            "reduce_bucket_size": min(parameters, _LARGEST_BUCKET),
            "stage3_param_persistence_threshold": 10 * shape.hidden_size,
        },
    }
