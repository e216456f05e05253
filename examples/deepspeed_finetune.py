"""DeepSpeed trains a transformers model whose sequences are split over ranks, on the sources of Python itself.

    torchrun --nproc-per-node 2 deepspeed_finetune.py
    deepspeed --num_gpus 4 deepspeed_finetune.py --model path/of/a/model --length 65536

A small model without training, and bytes, where no model is named. Who shares a sequence, and how, is said in
deepspeed_finetune.json, in the section "seqpar". Needs pip install 'seqpar[hf,deepspeed]'.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from seqpar.integrations import deepspeed, huggingface


def load(path: str | None):
    """A model with seqpar's attention, and what turns text into its tokens."""
    huggingface.register()
    if path is not None:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="seqpar")
        return model, lambda text: tokenizer(text)["input_ids"]
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
    return AutoModelForCausalLM.from_config(config), lambda text: list(text.encode())


def pack(encode, length: int, rows: int) -> list[dict[str, torch.Tensor]]:
    """Files end to end, cut into rows; positions restart where a file begins, and in a row."""
    tokens, positions = [], []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = encode(path.read_text(encoding="utf-8"))
        tokens += text
        positions += range(len(text))
        if len(tokens) >= rows * length:
            break
    found = []
    for begin in range(0, len(tokens) - length + 1, length)[:rows]:
        row, place = (torch.tensor(x[begin : begin + length]) for x in (tokens, positions))
        restart = (place == 0).int().cumsum(0) == 0  # a file that began in the row before
        place[restart] = torch.arange(int(restart.sum()))
        found.append({"input_ids": row, "labels": row, "position_ids": place})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or name of a model and its tokenizer")
    parser.add_argument("--length", type=int, default=1001, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--config", default=str(Path(__file__).with_suffix(".json")), help="of DeepSpeed")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by DeepSpeed's launcher")
    options = parser.parse_args()

    model, encode = load(options.model)
    engine, _, rows, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=pack(encode, options.length, options.rows),
        config=options.config,
    )
    for number, row in enumerate(rows, 1):
        loss = engine(**{name: x.to(engine.device) for name, x in row.items()}).loss
        engine.backward(loss)
        engine.step()
        if engine.global_rank == 0:
            print(f"micro-step {number} loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()  # its threads must not outlive the interpreter


if __name__ == "__main__":
    main()
