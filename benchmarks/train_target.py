"""A Llama trained on texts for so many minutes, as a target for measurements.

    python -m benchmarks.train_target --texts 'books-*.jsonl' --output target

The first part of the time goes to short windows, the rest to windows of the whole
context. It goes on where it was cut short, the time that has passed included.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_budgetdraft.training.data import read_texts

SHORT_TOKENS, SHORT_SHARE = 2048, 0.6
SAVE_SECONDS, LOG_SECONDS = 60.0, 10.0
#: Of the time, for the learning rate to rise.
WARM_UP = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--tokenizer", default="models/books-9m")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--context-tokens", type=int, default=16896)
    parser.add_argument("--tokens-per-step", type=int, default=131072)
    parser.add_argument("--hidden-size", type=int, default=640)
    parser.add_argument("--intermediate-size", type=int, default=1792)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    texts = read_texts(args.texts, tokenizer, unwraps_lines=True)
    tokens = np.concatenate(texts.with_format("numpy")["input_ids"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.context_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(device)
    log = train(model, tokens, args)
    model.bfloat16().save_pretrained(args.output, max_shard_size="15MB")
    tokenizer.save_pretrained(args.output)
    (args.output / "training.json").write_text(json.dumps(log, indent=1))
    (args.output / "state.pt").unlink(missing_ok=True)


def train(
    model: LlamaForCausalLM, tokens: np.ndarray, args: argparse.Namespace
) -> list[dict[str, float]]:
    """Trains in place.

    Args:
        tokens: [num_tokens], one stream.

    Returns:
        Seconds, tokens and loss so far, from time to time.
    """
    device = model.device
    is_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=is_gpu
    )
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "state.pt"
    state: dict[str, Any] = {"seconds": 0.0, "tokens": 0, "log": []}
    if path.is_file():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
    begun = time.monotonic() - state["seconds"]
    rng = np.random.default_rng(state["tokens"])
    total = 60 * args.minutes
    last_saved = last_logged = state["seconds"]
    model.train()
    while (seconds := time.monotonic() - begun) < total:
        share = seconds / total
        is_short = share < SHORT_SHARE
        length = min(SHORT_TOKENS, args.context_tokens)
        length = length if is_short else args.context_tokens
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(share / WARM_UP, 1 - share)
        count = max(1, args.tokens_per_step // length)
        starts = rng.integers(0, len(tokens) - length, count)
        windows = np.stack([tokens[start : start + length] for start in starts])
        ids = torch.from_numpy(windows).to(device, torch.int64)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state["tokens"] += ids.numel()
        if seconds - last_logged > LOG_SECONDS:
            last_logged = seconds
            entry = {
                "seconds": seconds,
                "tokens": state["tokens"],
                "window": length,
                "loss": loss.item(),
            }
            state["log"].append(entry)
            print(json.dumps(entry), flush=True)
        if seconds - last_saved > SAVE_SECONDS:
            last_saved = seconds
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "seconds": seconds, **parts}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
    return state["log"]


if __name__ == "__main__":
    main()
