"""The other side of `tokens_per_second`: transformers' LLaMA with galore-torch's AdamW."""

import sys
import time

import torch
from galore_torch.adamw import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"llama-60m": (512, 1376, 8, 8, 128), "llama-130m": (768, 2048, 12, 12, 256)}


def main(model: str, batch_size: int, seq_len: int) -> None:
    """Takes a step for every line on standard input and answers with its seconds and loss."""
    width, mlp_width, layers, heads, rank = SIZES[model]
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32_000,
            hidden_size=width,
            intermediate_size=mlp_width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=1024,
            use_cache=False,
        )
    )
    matrices = [(name, p) for name, p in llama.named_parameters() if p.ndim == 2]
    low_rank = [p for name, p in matrices if "attn" in name or "mlp" in name]
    chosen = {id(p) for p in low_rank}
    rest = [p for p in llama.parameters() if id(p) not in chosen]
    galore = dict(rank=rank, update_proj_gap=200, scale=0.25, proj_type="std")
    optimizer = AdamW(
        [{"params": rest}, {"params": low_rank, **galore}], lr=0.01, no_deprecation_warning=True
    )
    tokens = torch.randint(0, 256, (batch_size, seq_len))
    for _ in sys.stdin:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = llama(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        print(time.perf_counter() - start, loss.item(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
