"""Makes a second small generator, unlike the demo model in width, depth and heads, so that no setting is tuned to one.

    python tests/tools/second_model.py FOLDER         # 23 minutes beside other work; then --model-path FOLDER

The demo model teaches it: it draws the pictures whose tokens the second one learns. The tokenizers are the demo's.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import verify_proto_tokens as vpt  # noqa: E402

BACKGROUNDS = "on a wooden table, on green grass, on yellow sand, under the night sky, on a white background, "
BACKGROUNDS += "in a blue sky, on a pink background, on a teal background"
UNCONDITIONAL_SHARE, INPUT_NOISE = 0.1, 0.1


def taught_pictures(models: vpt.Models, count: int, batch: int = 64) -> tuple[list[str], Tensor]:
    """`count` prompts and the visual codes [count, N] that the demo model draws for them."""
    things = [thing.replace("_", " ") for thing in (vpt.DEMO_FOLDER / "training" / "things.txt").read_text().split()]
    everything = [f"a {thing} {place}" for thing in things for place in BACKGROUNDS.split(", ")]
    prompts, codes = random.Random(0).sample(everything, count), []
    for start in range(0, count, batch):
        options = vpt.parse_args(["--demo", "--cfg-scale", "3", "--seed", str(start)])
        codes.append(vpt.generate_visual_codes(models, prompts[start : start + batch], 64, options).codes)
    return prompts, torch.cat(codes)


def build(vocab_size: int) -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=768,
        max_position_embeddings=4352,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def train(generator: Qwen2ForCausalLM, models: vpt.Models, prompts: list[str], codes: Tensor, num_steps: int) -> None:
    """Next-token training on the codes behind each prompt; a share behind the negative prompt, for guidance."""
    rng = torch.Generator().manual_seed(2)
    prompt_ids = models.text_tokenizer([vpt.conditional_prompt(prompt) for prompt in prompts])["input_ids"]
    negative = models.text_tokenizer(vpt.negative_prompt())["input_ids"]
    optimizer = torch.optim.AdamW(generator.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, num_steps)
    num_tokens, noise_size = codes.shape[1], (32, codes.shape[1])
    for step in range(1, num_steps + 1):
        rows = torch.randperm(len(prompts), generator=rng)[:32]
        unconditional = torch.rand(32, generator=rng) < UNCONDITIONAL_SHARE
        texts = [negative if plain else prompt_ids[row] for row, plain in zip(rows, unconditional, strict=True)]
        stray = torch.randint(models.codebook_size, noise_size, generator=rng)
        fed = torch.where(torch.rand(noise_size, generator=rng) < INPUT_NOISE, stray, codes[rows])
        # Padding lies behind everything that counts, so causal attention needs no mask.
        sequences = [
            torch.cat((torch.tensor(text), tokens + models.visual_offset))
            for text, tokens in zip(texts, fed, strict=True)
        ]
        inputs = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        with torch.autocast("cpu", torch.bfloat16):
            hidden_states = generator.model(input_ids=inputs, use_cache=False).last_hidden_state
            places = torch.tensor([len(text) for text in texts])[:, None] - 1 + torch.arange(num_tokens)
            logits = generator.lm_head(hidden_states[torch.arange(32)[:, None], places])  # [32, N, V]
        loss = F.cross_entropy(
            logits.float().flatten(0, 1), (codes[rows] + models.visual_offset).flatten(), label_smoothing=0.1
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}/{num_steps} loss {loss.item():.3f}", flush=True)


def make(folder: Path, pictures: int = 1600, num_steps: int = 1600) -> Path:
    """Trains the model and saves it with the demo's text tokenizer in `folder`."""
    models = vpt.load_models(vpt.parse_args(["--demo", "--device", "cpu"]))
    prompts, codes = taught_pictures(models, pictures)
    generator = build(models.generator.config.vocab_size)
    train(generator, models, prompts, codes.clone(), num_steps)
    generator.save_pretrained(folder)
    models.text_tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=1600, help="to learn from (default: %(default)s)")
    parser.add_argument("--num-steps", type=int, default=1600, help="(default: %(default)s)")
    args = parser.parse_args()
    make(args.folder, args.pictures, args.num_steps)


if __name__ == "__main__":
    main()
