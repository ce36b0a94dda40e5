"""Example figures in the form that `a3 eval --json` prints."""

EVALUATION = {
    "model": "out", "dataset": "held/out.txt", "seq_len": 64, "blocks": 2, "tokens": 128, "perplexity": 12.5,
    "source_perplexity": 10.0, "perplexity_increase": 2.5, "kl": 0.0321, "top1_agreement": 0.875,
}  # fmt: skip
