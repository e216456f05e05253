"""A transformers Trainer whose sequences are split over ranks: a small Llama on the sources of Python itself.

    torchrun --nproc-per-node 2 huggingface_trainer.py
    torchrun --nproc-per-node 4 huggingface_trainer.py --sequence-ranks 2

Two things differ from any other Trainer: `parallelize`, and who gets which rows. Needs pip install 'seqpar[hf]'.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from seqpar.integrations import huggingface

BYTES = 512
"""Of a file, at most."""


class SequenceTrainer(Trainer):
    """Deals rows to replicas of the model, and the same rows to all ranks that share a sequence.

    A plain Trainer deals every process rows of its own, and `parallelize` would refuse them. Evaluation needs the like
    of `get_eval_dataloader`, and prediction_loss_only=True: a rank's logits are those of its own tokens.
    """

    def __init__(self, *args, sequence_ranks: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.sequence_ranks = sequence_ranks

    def get_train_dataloader(self) -> DataLoader:
        """Every replica's own rows, in the same order on all of its ranks."""
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            shuffle=True,
            collate_fn=self.data_collator,
            drop_last=True,
        )
        return prepare_data_loader(
            loader,
            device=self.args.device,
            num_processes=self.args.world_size // self.sequence_ranks,
            process_index=self.args.process_index // self.sequence_ranks,
            put_on_device=True,
            use_seedable_sampler=True,
            data_seed=self.args.seed,
        )


class Losses(TrainerCallback):
    """Prints the loss of every step, on the first rank."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and "loss" in logs:
            print(f"step {state.global_step} loss {logs['loss']:.6f}", flush=True)


def documents(count: int) -> list[dict[str, list[int]]]:
    """The beginnings of so many files, of very different lengths, as bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:count]
    return [{"input_ids": list(path.read_bytes()[: BYTES - 7 * i % 400])} for i, path in enumerate(files)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--sequence-ranks", type=int, default=None, help="consecutive ranks of a sequence; default: all"
    )
    parser.add_argument("--gpu", action="store_true", help="run on GPUs, over NCCL")
    options = parser.parse_args()

    arguments = TrainingArguments(
        output_dir="huggingface_trainer",
        max_steps=options.steps,
        per_device_train_batch_size=4,  # documents, which the collator packs into one row
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not options.gpu,
        ddp_backend="gloo" if "LOCAL_RANK" in os.environ and not options.gpu else None,
        ddp_find_unused_parameters=False,
        seed=0,
    )
    world = arguments.world_size
    ranks = options.sequence_ranks or world
    group, everyone = None, None
    if world > 1:
        group = dist.init_device_mesh(arguments.device.type, (world // ranks, ranks), mesh_dim_names=("dp", "sp"))["sp"]
        everyone = dist.group.WORLD

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        attn_implementation="seqpar",
    )
    huggingface.register()
    model = LlamaForCausalLM(config)
    huggingface.parallelize(model, group, loss_group=everyone)

    trainer = SequenceTrainer(
        model,
        arguments,
        sequence_ranks=ranks,
        train_dataset=documents(120),
        data_collator=DataCollatorWithFlattening(),  # its position_ids restart in every document
        callbacks=[Losses()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if world > 1:
        dist.destroy_process_group()  # its threads must not outlive the interpreter


if __name__ == "__main__":
    main()
