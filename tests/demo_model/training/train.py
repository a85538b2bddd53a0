"""Makes the demo model from nothing: pictures -> visual tokenizer -> visual tokens -> generator -> files.

    python tests/demo_model/training/train.py            # everything; goes on where it was interrupted

Intermediate results live in `--work-dir` (about 1.5 GB); the finished model is written to the folder above. Packages
beyond the script's own: `emoji`, and `npm` for the pictures (fetched once).
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import pictures
import torch
import vq
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from verify_proto_tokens import conditional_prompt, negative_prompt

DEMO = Path(__file__).resolve().parents[1]
INPUT_NOISE = 0.1  # share of the visual tokens fed in that are random
# Guidance multiplies differences of log-probabilities, also of tokens that neither prompt expects. Much smoothing of
# the unconditional side keeps its floor above the conditional one's: what neither expects is pushed down, not drawn up.
LABEL_SMOOTHING, UNCONDITIONAL_SMOOTHING = 0.2, 0.8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=DEMO / ".work", help="intermediate results and checkpoints")
    parser.add_argument("--output", type=Path, default=DEMO, help="where the finished model goes")
    parser.add_argument("--vq-steps", type=int, default=3400, help="training steps of the visual tokenizer (batch 16)")
    parser.add_argument("--decoder-steps", type=int, default=2400, help="further steps of its decoder alone (batch 16)")
    parser.add_argument("--generator-steps", type=int, default=3300, help="training steps of the generator (batch 64)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def save_atomically(state: object, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_pictures(work_dir: Path) -> tuple[list[str], np.ndarray]:
    """Captions and pictures [M, 256, 256, 3], drawn the first time, then memory-mapped."""
    array_file, caption_file = work_dir / "pictures.npy", work_dir / "captions.txt"
    if not array_file.exists():
        print("drawing the pictures")
        captions, images = pictures.draw_all(pictures.fetch_emoji(work_dir))
        caption_file.write_text("\n".join(captions))
        np.save(work_dir / "partial.npy", images)
        os.replace(work_dir / "partial.npy", array_file)
    return caption_file.read_text().split("\n"), np.load(array_file, mmap_mode="r")


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1], channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(step: int, num_steps: int, peak: float, warmup: int) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup))))


class Training:
    """A training run that can be interrupted: weights, their moving average, optimizer and step in one checkpoint."""

    def __init__(
        self, name: str, modules: nn.Module, args, num_steps: int, peak: float, decay: float, betas=(0.9, 0.99)
    ):
        self.name, self.modules, self.num_steps, self.peak = name, modules, num_steps, peak
        self.file = args.work_dir / f"{name}.pt"
        self.seed = args.seed
        matrices = [p for p in modules.parameters() if p.ndim > 1]
        vectors = [p for p in modules.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=peak, betas=betas, fused=True)
        self.average = torch.optim.swa_utils.AveragedModel(
            modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
        )
        self.step, self.seconds = 0, 0.0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            modules.load_state_dict(state["modules"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        state = {"modules": self.modules.state_dict(), "average": self.average.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step, "seconds": self.seconds}
        save_atomically(state, self.file)

    def run(self, loss_of_batch, save_every: int = 250) -> nn.Module:
        """Trains to the end; `loss_of_batch(rng)` draws a batch and returns its loss. Returns the averaged weights."""
        started, losses = time.monotonic() - self.seconds, []
        while self.step < self.num_steps:
            # A generator of its own a step: a resumed run sees the batches that it would have seen.
            rng = np.random.default_rng((self.seed, self.step))
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.num_steps, self.peak, warmup=200)
            loss = loss_of_batch(rng)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.average.update_parameters(self.modules)
            self.step += 1
            losses.append(loss.item())
            if self.step % 50 == 0:
                self.seconds = time.monotonic() - started
                mean = sum(losses[-50:]) / len(losses[-50:])
                print(f"{self.name} {self.step}/{self.num_steps} loss {mean:.4f} {self.seconds:.0f} s", flush=True)
            if self.step % save_every == 0 or self.step == self.num_steps:
                self.save()
        return self.average.module


def train_tokenizer(images: np.ndarray, args) -> nn.ModuleDict:
    torch.manual_seed(args.seed)
    modules = nn.ModuleDict({"encoder": vq.Encoder(), "decoder": vq.Decoder()}).to(memory_format=torch.channels_last)

    def loss_of_batch(rng) -> Tensor:
        target = to_pixels(images[np.sort(rng.choice(len(images), 16, replace=False))])
        with torch.autocast("cpu", torch.bfloat16):
            latents = modules["encoder"].net(target)
            codes = modules["encoder"].quantizer(latents.float())
            pixels = modules["decoder"].net(codes)
        return vq.reconstruction_loss(pixels.float(), target)

    training = Training("tokenizer", modules, args, args.vq_steps, peak=2e-3, decay=0.01)
    return training.run(loss_of_batch).eval()


def train_decoder(decoder: vq.Decoder, images: np.ndarray, codes: Tensor, args) -> vq.Decoder:
    """Goes on with the decoder alone: sharper pictures of the same tokens."""

    def loss_of_batch(rng) -> Tensor:
        rows = np.sort(rng.choice(len(images), 16, replace=False))
        with torch.autocast("cpu", torch.bfloat16):
            pixels = decoder(codes[rows].view(-1, 1, 8, 8))[:, :, 0]
        return vq.reconstruction_loss(pixels.float(), to_pixels(images[rows]))

    training = Training("decoder", decoder.train(), args, args.decoder_steps, peak=1e-3, decay=0.01)
    return training.run(loss_of_batch).eval()


def export(module: nn.Module, file: Path) -> None:
    """Writes bfloat16 TorchScript."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.save(torch.jit.script(module.bfloat16().eval()), file)


@torch.inference_mode()
def encode_all(images: np.ndarray, encoder_file: Path) -> Tensor:
    """The visual codes of all pictures, [M, N], by the encoder as exported."""
    encoder = torch.jit.load(encoder_file)
    batches = [
        encoder(to_pixels(images[start : start + 32]).unsqueeze(2).bfloat16())[0].flatten(1).long()
        for start in range(0, len(images), 32)
    ]
    return torch.cat(batches)


def make_text_tokenizer(captions: list[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE of Qwen2's kind, trained on the prompts."""
    corpus = [conditional_prompt(text) for text in captions] + [negative_prompt()] * 8
    special = ["<|t2i|>", "<|soi|>"]
    corpus = [text.replace(special[0], "").replace(special[1], "") for text in corpus]
    return Qwen2Tokenizer().train_new_from_iterator(corpus, vocab_size=1400, new_special_tokens=special)


def make_generator(vocab_size: int, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=960,
        max_position_embeddings=4352,
        # Sequences are short here: a small base gives every pair of dimensions a rotation that can be seen.
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    # On short sequences plain matrix products beat the fused attention, whose backward is slow on a CPU.
    config._attn_implementation = "eager"
    return Qwen2ForCausalLM(config)


def train_generator(captions: list[str], codes: Tensor, text_tokenizer, args) -> Qwen2ForCausalLM:
    """Next-token training on the visual tokens behind each prompt; one sample in ten is unconditional, for CFG."""
    held_out = pictures.held_out(captions)
    seen = [index for index, text in enumerate(captions) if text not in held_out]
    prompts = text_tokenizer([conditional_prompt(captions[index]) for index in seen])["input_ids"]
    negative = text_tokenizer(negative_prompt())["input_ids"]
    targets = codes[seen] + len(text_tokenizer)  # [M, N]
    num_tokens = targets.shape[1]
    generator = make_generator(len(text_tokenizer) + vq.CODEBOOK_SIZE, args.seed)

    def loss_of_batch(rng) -> Tensor:
        rows = rng.choice(len(seen), 64, replace=False)
        unconditional = rng.random(len(rows)) < 0.1  # [B]
        batch = [torch.tensor(prompts[row]) for row in rows]
        for place in unconditional.nonzero()[0]:
            batch[place] = torch.tensor(negative)
        lengths = torch.tensor([len(prompt) for prompt in batch])
        target = targets[rows]  # [B, N]
        # Some of the tokens fed in are replaced, so that sampling can go on from a token that training never had there.
        noise = torch.from_numpy(rng.integers(vq.CODEBOOK_SIZE, size=target.shape)) + len(text_tokenizer)
        fed = torch.where(torch.from_numpy(rng.random(target.shape)) < INPUT_NOISE, noise, target)
        sequences = [torch.cat((prompt, tokens[:-1])) for prompt, tokens in zip(batch, fed, strict=True)]
        # Padding lies behind everything that counts, so causal attention needs no mask.
        inputs = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        with torch.autocast("cpu", torch.bfloat16):
            hidden_states = generator.model(input_ids=inputs, use_cache=False).last_hidden_state
            places = lengths[:, None] - 1 + torch.arange(num_tokens)  # [B, N]
            hidden_states = hidden_states[torch.arange(len(rows))[:, None], places]
            logits = generator.lm_head(hidden_states)  # [B, N, V]
        log_probabilities = logits.float().log_softmax(-1)
        of_target = log_probabilities.gather(-1, target[..., None]).mean((1, 2))  # [B]
        of_any_code = log_probabilities[..., len(text_tokenizer) :].mean((1, 2))
        smoothing = torch.where(torch.from_numpy(unconditional), UNCONDITIONAL_SMOOTHING, LABEL_SMOOTHING)
        return -((1 - smoothing) * of_target + smoothing * of_any_code).mean()

    training = Training("generator", generator, args, args.generator_steps, peak=1.2e-3, decay=0.05, betas=(0.9, 0.95))
    return training.run(loss_of_batch).eval()


def main() -> None:
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    captions, images = load_pictures(args.work_dir)
    print(f"{len(captions)} pictures")
    vq_folder, generator_folder = args.output / "vq", args.output / "generator"
    visual_tokenizer = train_tokenizer(images, args)
    export(visual_tokenizer["encoder"], vq_folder / "encoder.jit")
    codes = encode_all(images, vq_folder / "encoder.jit")
    print(f"{codes.unique().numel()} of {vq.CODEBOOK_SIZE} codes are used")
    export(train_decoder(visual_tokenizer["decoder"], images, codes, args), vq_folder / "decoder.jit")
    text_tokenizer = make_text_tokenizer(captions)
    generator = train_generator(captions, codes, text_tokenizer, args)
    generator.bfloat16().save_pretrained(generator_folder)
    text_tokenizer.save_pretrained(generator_folder)


if __name__ == "__main__":
    main()
