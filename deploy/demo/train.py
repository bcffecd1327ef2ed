"""Full fine-tunes (all parameters) of the demo base: ``python deploy/demo/train.py scripture OUT --steps 400``.

Plain AdamW on the answer's tokens, or AdamR, which pulls back to the base's weights; with ``--lora RANK`` an adapter
(which needs peft) instead of all parameters. One core makes about 15 steps a
minute where it multiplies bfloat16 in hardware, else about 5; the checkpoint written is an ordinary transformers
folder, from which ``artifacts.py`` makes the artifact.
"""

import argparse
import random
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from base import base_folder
from corpora import CORPORA, Example, load
from torch.nn.functional import cross_entropy
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from deltaserve.delta_store.pruning.adamr import AdamR


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], int]:
    """Token ids of the whole exchange, and how many of them are the prompt's."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": example.prompt}], add_generation_prompt=True, tokenize=False
    )
    prompt_ids = tokenizer(prompt).input_ids
    answer_ids = tokenizer(example.answer).input_ids
    return prompt_ids + answer_ids + [tokenizer.eos_token_id], len(prompt_ids)


def batch_of(encoded: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded ``ids``, ``attention_mask`` and ``labels`` [batch, length]; prompts and padding have label -100."""
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.zeros(len(encoded), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, (tokens, prompt) in enumerate(encoded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return ids, mask, labels


def answer_loss(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy (nats a token) over the answers; only their rows go through the output head."""
    ids, mask, labels = batch
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    target = labels[:, 1:]
    return cross_entropy(model.lm_head(hidden[target != -100]).float(), target[target != -100])


def products_in_bfloat16() -> AbstractContextManager[object]:
    """Weights and their sums stay float32. Only where the processor has instructions for it: else it is much slower."""
    known = torch.cpu.get_capabilities()
    fast = known.get("avx512_bf16") or known.get("amx_bf16")
    return torch.autocast("cpu", torch.bfloat16) if fast else nullcontext()


def optimizer_of(model: torch.nn.Module, name: str, lr: float, pull: float) -> torch.optim.Optimizer:
    """AdamW without decay, or AdamR, whose base are the weights that the model has now."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "adamr":
        return AdamR(trained, lr=lr, pull=pull)
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)


def adapter_of(model: torch.nn.Module, rank: int) -> torch.nn.Module:
    """Put an adapter into the model's linear layers, in place; what saves it alone. All other weights are frozen."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", choices=sorted(CORPORA))
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=192, help="longer examples are left out")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--optimizer", choices=("adamw", "adamr"), default="adamw")
    parser.add_argument("--pull", type=float, default=0.1, help="AdamR's strength")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train an adapter of all linear layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    model = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32)
    encoded = [encode(tokenizer, example) for example in load(args.corpus)["train"]]
    encoded = [example for example in encoded if len(example[0]) <= args.max_tokens]
    random.Random(args.seed).shuffle(encoded)
    print(f"{args.corpus}: {len(encoded)} training examples")

    saved = model if args.lora is None else adapter_of(model, args.lora)
    optimizer = optimizer_of(model, args.optimizer, args.lr, args.pull)
    warmup = min(20, max(1, args.steps // 4))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.02, 1 - step / args.steps))
    )
    model.train()
    recent: list[float] = []
    progress = trange(args.steps, desc=args.corpus, mininterval=10)
    for step in progress:
        batch = [encoded[(step * args.batch + j) % len(encoded)] for j in range(args.batch)]
        with products_in_bfloat16():
            loss = answer_loss(model, batch_of(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        recent = [*recent[-19:], loss.item()]
        progress.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")

    saved.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
