"""Makes the demo model from nothing: pictures -> visual tokenizer -> visual tokens -> generator -> files.

    python tests/demo_model/training/train.py            # everything; goes on where it was interrupted

Intermediate results live in `--work-dir` (about 6 GB); the finished model is written to the folder above. Beyond the
script's own packages it takes `emoji`, `npm` for the pictures (fetched once), and a C++ compiler for `torch.compile`.
"""

import argparse
import itertools
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import pictures
import torch
import torch.nn.functional as F
import vq
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from verify_proto_tokens import conditional_prompt, negative_prompt, size_token_of

DEMO = Path(__file__).resolve().parents[1]
SIZES = (256, 512)  # in pixels; 8 x 8 and 16 x 16 tokens
SMALL = SIZES[:1]  # what the first stages are trained on: it costs a quarter
PICTURES_AT_ONCE = {256: 16, 512: 4}
TOKEN_OF_512 = "<|512px|>"
INPUT_NOISE = 0.1  # share of the visual tokens fed in that are random
UNCONDITIONAL_SHARE = 0.1
# Guidance multiplies differences of log-probabilities, also of tokens that neither prompt expects. Much smoothing of
# the unconditional side keeps its floor above the conditional one's: what neither expects is pushed down, not drawn up.
LABEL_SMOOTHING, UNCONDITIONAL_SMOOTHING = 0.2, 0.8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=DEMO / ".work", help="intermediate results and checkpoints")
    parser.add_argument("--output", type=Path, default=DEMO, help="where the finished model goes")
    parser.add_argument(
        "--start-from",
        type=Path,
        metavar="FOLDER",
        help="vq/ and generator/ to go on from, in place of the first stages",
    )
    parser.add_argument("--tokenizer-steps", type=int, default=3400, help="at 256 px (default: %(default)s)")
    parser.add_argument("--small-steps", type=int, default=2400, help="generator at 256 px (default: %(default)s)")
    parser.add_argument("--generator-steps", type=int, default=2400, help="then at both (default: %(default)s)")
    parser.add_argument("--decoder-steps", type=int, default=1500, help="at both sizes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def fast_arithmetic() -> torch.autocast:
    """Matrix products in bfloat16, weights in float32: many times as fast where a processor has such arithmetic."""
    has_bfloat16 = any(has and "bf16" in name for name, has in torch.cpu.get_capabilities().items())
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16)


def save_atomically(state: object, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_pictures(work_dir: Path, size: int) -> np.ndarray:
    """The pictures of all captions, uint8 [M, size, size, 3], drawn the first time, then memory-mapped."""
    file, partial = work_dir / f"pictures_{size}.npy", work_dir / f"pictures_{size}.partial"
    if not file.exists():
        print(f"drawing the pictures of {size} px", flush=True)
        shape = (len(pictures.all_captions()), size, size, 3)
        drawn = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        pictures.draw_all(pictures.fetch_emoji(work_dir), size, drawn)
        drawn.flush()
        os.replace(partial, file)
    return np.load(file, mmap_mode="r")


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1], channels last in memory."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Rises over 200 steps, and falls to nothing over the others."""
    return peak * min((step + 1) / 200, (num_steps - step) / num_steps)


def make_adamw(parameters, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW that lets matrices decay alone."""
    parameters = list(parameters)
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=betas, fused=True)


class Training:
    """A training run that can be interrupted: weights, their moving average, optimizers and step in one checkpoint."""

    def __init__(self, name: str, modules: nn.Module, optimizers: list, args, num_steps: int, peak: float):
        self.name, self.modules, self.optimizers = name, modules, optimizers
        self.num_steps, self.peak, self.seed = num_steps, peak, args.seed
        self.file = args.work_dir / f"{name}.pt"
        self.average = torch.optim.swa_utils.AveragedModel(
            modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
        )
        self.step, self.seconds = 0, 0.0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            modules.load_state_dict(state["modules"])
            self.average.load_state_dict(state["average"])
            for optimizer, of_optimizer in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(of_optimizer)
            self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        state = {"modules": self.modules.state_dict(), "average": self.average.state_dict()}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        state |= {"step": self.step, "seconds": self.seconds}
        save_atomically(state, self.file)

    def run(self, loss_of_batch, sizes: tuple[int, ...], save_every: int = 100) -> nn.Module:
        """Trains to the end and returns the mean weights; `loss_of_batch(size, rng)` draws a batch of pictures.

        The steps take the sizes in turn.
        """
        started, losses = time.monotonic() - self.seconds, {size: [] for size in sizes}
        while self.step < self.num_steps:
            # A generator of its own a step: a resumed run sees the batches that it would have seen.
            rng = np.random.default_rng((self.seed, self.step))
            for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in self.optimizers):
                group["lr"] = learning_rate(self.step, self.num_steps, self.peak)
            size = sizes[self.step % len(sizes)]
            loss = loss_of_batch(size, rng)
            self.modules.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.average.update_parameters(self.modules)
            self.step += 1
            self.seconds = time.monotonic() - started
            losses[size].append(loss.item())
            if self.step % 50 == 0:
                means = ", ".join(f"{np.mean(of_size[-25:]):.4f} at {size} px" for size, of_size in losses.items())
                print(f"{self.name} {self.step}/{self.num_steps} loss {means}, {self.seconds:.0f} s", flush=True)
            if self.step % save_every == 0 or self.step == self.num_steps:
                self.save()
        return self.average.module


def some(images: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
    """The rows of `count` different pictures and their pixels [B, 3, H, W]."""
    rows = np.sort(rng.choice(len(images), count, replace=False))
    return rows, to_pixels(images[rows])


def train_tokenizer(images: dict[int, np.ndarray], args) -> nn.ModuleDict:
    """Encoder and decoder at 256 px. The encoder sees so little of a picture that it serves other sizes, too."""
    torch.manual_seed(args.seed)
    modules = nn.ModuleDict({"encoder": vq.Encoder(), "decoder": vq.Decoder()}).to(memory_format=torch.channels_last)

    def loss_of_batch(size: int, rng: np.random.Generator) -> Tensor:
        _, target = some(images[size], PICTURES_AT_ONCE[size], rng)
        with fast_arithmetic():
            features = modules["encoder"].net(target)
            pixels = modules["decoder"].net(modules["encoder"].quantizer(features.float()))
        return vq.reconstruction_loss(pixels.float(), target)

    optimizer = make_adamw(modules.parameters(), weight_decay=0.01, betas=(0.9, 0.99))
    training = Training("tokenizer", modules, [optimizer], args, args.tokenizer_steps, peak=2e-3)
    return training.run(loss_of_batch, SMALL).eval()


def train_decoder(decoder: vq.Decoder, images: dict[int, np.ndarray], codes: dict[int, Tensor], args) -> vq.Decoder:
    """Goes on with the decoder alone, at both sizes: sharper pictures of the same tokens."""

    def loss_of_batch(size: int, rng: np.random.Generator) -> Tensor:
        rows, target = some(images[size], PICTURES_AT_ONCE[size], rng)
        with fast_arithmetic():
            pixels = decoder(codes[size][rows].unsqueeze(1))[:, :, 0]
        return vq.reconstruction_loss(pixels.float(), target)

    optimizer = make_adamw(decoder.parameters(), weight_decay=0.01, betas=(0.9, 0.99))
    training = Training("decoder", decoder.train(), [optimizer], args, args.decoder_steps, peak=1e-3)
    return training.run(loss_of_batch, SIZES).eval()


def load_tokenizer(folder: Path) -> tuple[vq.Encoder, vq.Decoder]:
    """Encoder and decoder as exported, ready to learn on."""
    encoder, decoder = vq.Encoder(), vq.Decoder().to(memory_format=torch.channels_last)
    encoder.load_state_dict(torch.jit.load(folder / "encoder.jit").float().state_dict())
    decoder.load_state_dict(torch.jit.load(folder / "decoder.jit").float().state_dict())
    return encoder, decoder


def export(module: nn.Module, file: Path) -> None:
    """Writes bfloat16 TorchScript."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.save(torch.jit.script(module.bfloat16().eval()), file)


@torch.inference_mode()
def encode_all(images: np.ndarray, encoder_file: Path) -> Tensor:
    """The visual codes of all pictures, [M, h, w], by the encoder as exported, in float32."""
    encoder = torch.jit.load(encoder_file).float()
    starts = range(0, len(images), 16)
    return torch.cat([encoder(to_pixels(images[at : at + 16]).unsqueeze(2))[0][:, 0].long() for at in starts])


def load_codes(work_dir: Path, images: dict[int, np.ndarray], encoder_file: Path) -> dict[int, Tensor]:
    """The codes of all pictures of each size, encoded the first time."""
    file = work_dir / "codes.pt"
    if not file.exists():
        print("encoding the pictures", flush=True)
        codes = {size: encode_all(images[size], encoder_file) for size in SIZES}
        for size in SIZES:
            print(f"{size} px: {codes[size].unique().numel()} of {vq.CODEBOOK_SIZE} codes are used", flush=True)
        save_atomically(codes, file)
    return torch.load(file, weights_only=True)


def make_text_tokenizer(captions: list[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE of Qwen2's kind, trained on the prompts."""
    corpus = [conditional_prompt(text) for text in captions] + [negative_prompt()] * 8
    # The first size goes without: at 256 px a prompt is SimpleAR's, word for word. Were all sizes without, the first
    # token of a picture could not but guess its size.
    special = ["<|t2i|>", "<|soi|>", TOKEN_OF_512]
    corpus = [text.replace(special[0], "").replace(special[1], "") for text in corpus]
    return Qwen2Tokenizer().train_new_from_iterator(corpus, vocab_size=1400, new_special_tokens=special)


def make_generator(vocab_size: int, seed: int, hidden_size: int = 512, num_layers: int = 6) -> Qwen2ForCausalLM:
    """Of heads of 32 numbers, and a key-value head for each 128 of the hidden size."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 128,
        intermediate_size=hidden_size * 15 // 8,
        max_position_embeddings=4352,
        # Sequences are short here: a small base gives every pair of dimensions a rotation that can be seen.
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def load_generator(folder: Path) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    """A generator to go on with and its tokenizer."""
    generator = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return generator, Qwen2Tokenizer.from_pretrained(folder)


def next_token_losses(
    generator: Qwen2ForCausalLM, prompts: Tensor, lengths: Tensor, fed: Tensor, targets: Tensor, smoothing: float
) -> Tensor:
    """Cross-entropy of the visual ids `targets` [B, N] behind each prompt, smoothed over all codes; [B].

    `prompts` [B, L] are padded to the right from their `lengths` [B] on; `fed` [B, N] are the ids that the generator
    reads where the targets stand.
    """
    rows, places = torch.arange(len(prompts))[:, None], lengths[:, None] + torch.arange(targets.shape[1])  # [B, N]
    # Padding lies behind everything that counts, so causal attention needs no mask.
    inputs = F.pad(prompts, (0, targets.shape[1]))
    inputs[rows, places] = fed
    with fast_arithmetic():
        hidden_states = generator.model(input_ids=inputs[:, :-1], use_cache=False).last_hidden_state
        logits = generator.lm_head(hidden_states[rows, places - 1])  # [B, N, V]
    log_probabilities = logits.float().log_softmax(-1)
    of_target = log_probabilities.gather(-1, targets[..., None]).mean((1, 2))  # [B]
    of_any_code = log_probabilities[..., -vq.CODEBOOK_SIZE :].mean((1, 2))  # [B]
    return -((1 - smoothing) * of_target + smoothing * of_any_code)


def padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Prompts of all lengths as one tensor [M, L], padded to the right, and their lengths [M]."""
    sequences = [torch.tensor(prompt) for prompt in prompts]
    return nn.utils.rnn.pad_sequence(sequences, batch_first=True), torch.tensor([len(prompt) for prompt in prompts])


def train_generator(
    name: str,
    generator: Qwen2ForCausalLM,
    text_tokenizer: PreTrainedTokenizerBase,
    captions: list[str],
    codes: dict[int, Tensor],
    sequences_at_once: dict[int, int],
    args: argparse.Namespace,
) -> Qwen2ForCausalLM:
    """Next-token training on the visual tokens behind each prompt; one sample in ten is unconditional, for CFG."""
    held_out, sizes = pictures.held_out(), tuple(sequences_at_once)
    seen = [index for index, text in enumerate(captions) if text not in held_out]
    prompts, negatives, targets = {}, {}, {}
    for size in sizes:
        told = size_token_of(text_tokenizer, size)
        prompts[size] = padded(text_tokenizer([conditional_prompt(captions[i], told) for i in seen])["input_ids"])
        negatives[size] = padded(text_tokenizer([negative_prompt(told)])["input_ids"])
        targets[size] = codes[size][seen].flatten(1) + len(text_tokenizer)  # [M, N]

    def loss_of_batch(size: int, rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.choice(len(seen), sequences_at_once[size], replace=False))
        target = targets[size][rows]  # [B, N]
        # Some of the tokens fed in are replaced, so that sampling can go on from a token that training never had there.
        noise = torch.from_numpy(rng.integers(vq.CODEBOOK_SIZE, size=target.shape)) + len(text_tokenizer)
        fed = torch.where(torch.from_numpy(rng.random(target.shape)) < INPUT_NOISE, noise, target)
        # The two kinds apart: the negative prompt is three times as long.
        count = math.ceil(UNCONDITIONAL_SHARE * len(rows))
        texts, lengths = (side[rows[count:]] for side in prompts[size])
        conditional = next_token_losses(generator, texts, lengths, fed[count:], target[count:], LABEL_SMOOTHING)
        texts, lengths = (side.repeat_interleave(count, 0) for side in negatives[size])
        without = next_token_losses(generator, texts, lengths, fed[:count], target[:count], UNCONDITIONAL_SMOOTHING)
        return torch.cat((conditional, without)).mean()

    named = list(generator.named_parameters())
    matrices = [parameter for name, parameter in named if ".layers." in name and parameter.ndim == 2]
    others = [parameter for name, parameter in named if ".layers." not in name or parameter.ndim < 2]
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        make_adamw(others, weight_decay=0.05, betas=(0.9, 0.95)),
    ]
    num_steps, peak = (args.small_steps, 2e-3) if sizes == SMALL else (args.generator_steps, 2e-3)
    training = Training(name, generator.train(), optimizers, args, num_steps, peak)
    return training.run(loss_of_batch, sizes).eval()


def main() -> None:
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    images = {size: load_pictures(args.work_dir, size) for size in SIZES}
    vq_folder, generator_folder = args.output / "vq", args.output / "generator"
    captions = pictures.all_captions()
    if args.start_from:
        encoder, decoder = load_tokenizer(args.start_from / "vq")
    else:
        encoder, decoder = train_tokenizer(images, args).values()
    export(encoder, vq_folder / "encoder.jit")
    codes = load_codes(args.work_dir, images, vq_folder / "encoder.jit")
    if args.start_from:
        generator, text_tokenizer = load_generator(args.start_from / "generator")
    else:
        text_tokenizer = make_text_tokenizer(captions)
        generator = make_generator(len(text_tokenizer) + vq.CODEBOOK_SIZE, args.seed)
        generator.model.compile(dynamic=False)
        generator = train_generator("generator-small", generator, text_tokenizer, captions, codes, {256: 64}, args)
    generator.model.compile(dynamic=False)
    generator = train_generator("generator", generator, text_tokenizer, captions, codes, {256: 16, 512: 20}, args)
    generator.bfloat16().save_pretrained(generator_folder)
    text_tokenizer.save_pretrained(generator_folder)
    export(train_decoder(decoder, images, codes, args), vq_folder / "decoder.jit")


if __name__ == "__main__":
    main()
