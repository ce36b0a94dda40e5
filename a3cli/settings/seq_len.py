"""The tokens per block, whose default depends on the model: a stage resolves it once it has read the configuration."""

from typing import Any

USUAL_SEQ_LEN = 2048


def resolved_seq_len(seq_len: int | None, context: Any) -> int:
    """Return the tokens per block: as given, or the default for a model of this context.

    A given number may be longer than the context, which commands refuse. A context that is no number is no limit.
    """
    if seq_len is not None:
        return seq_len
    return min(USUAL_SEQ_LEN, context) if isinstance(context, int) and context >= 2 else USUAL_SEQ_LEN


def known_seq_len(seq_len: int | None) -> int:
    """Return the tokens per block, which a stage resolves as soon as it knows the model's context."""
    assert seq_len is not None, "the default of seq_len has not been resolved"
    return seq_len
