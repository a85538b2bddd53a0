"""List what tests and tools share: names in W&B and history.csv, a run's files, captions, seeds, the usual recipe."""

HISTORY = [
    "train/loss",
    "train/accuracy",
    "train/top5_accuracy",
    "train/correct_tokens",
    "train/best_accuracy",
    "train/learning_rate",
    "embeddings/e_t_norm",
    "embeddings/m_norm",
    "gradients/grad_norm",
]
COLUMNS = ["step", *HISTORY]
MEDIA = {"reference_image", "reconstructed_image", "comparison", "training_curves", "token_error_map"}
SUMMARY = {
    "final_accuracy",
    "best_accuracy",
    "final_top5_accuracy",
    "final_loss",
    "num_errors",
    "error_rate",
    "total_params",
    "status",
    "one_pass_seconds",
    "autoregressive_seconds",
    "speedup",
}
FILES = {f"{name}.png" for name in MEDIA} | {"config.json", "history.csv", "summary.json", "proto_tokens.safetensors"}
STATE = "interrupted_run.pt"

# The captions of the benches and the study: each background of the demo model once.
CAPTIONS = (
    "a red apple on a wooden table",
    "a penguin on green grass",
    "a sailboat on yellow sand",
    "a locomotive under the night sky",
    "a pizza on a white background",
    "a violin in a blue sky",
    "a lion on a pink background",
    "a cactus on a teal background",
)
OTHER_CAPTIONS = (
    "a banana on a wooden table",
    "a dog on green grass",
    "a crab on yellow sand",
    "a rocket under the night sky",
    "a hamburger on a white background",
    "a guitar in a blue sky",
    "a tiger on a pink background",
    "a rose on a teal background",
)
SEEDS = (42, 43)
# The usual recipe, as options of the script.
USUAL_RECIPE = (
    "--optimizer adamw --learning-rate 0.01 --warmup-steps 0 --betas 0.9,0.999 --initial-scale 0.01 --grad-clip 1"
)
