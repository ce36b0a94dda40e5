"""Rules that say which runtimes load an export."""

from a3cli.runtimes.rules import NO, UNTRIED, YES, Verdict, judge, summarise, tokenizer_class_of

__all__ = ["NO", "UNTRIED", "YES", "Verdict", "judge", "summarise", "tokenizer_class_of"]
